"""Calls model.forward(x) where others call model(x), and accumulates the losses of an update before one backward."""

import torch
from torch import nn
from torch.nn import functional as F

from conformance import Recipe, everything_but
from tests.stacks import gpt
from tests.stacks.gpt import Config


def train(config: Config, fault: str) -> None:
    torch.manual_seed(config.seed)
    model = gpt.GPT(**config.shape)
    parameters = gpt.groups(model)
    if fault == "only the blocks are trained":
        parameters = gpt.groups(model.blocks)
    optimizer = config.optimizer(parameters, **config.arguments)
    microbatches = list(zip(config.batches, config.labels))
    for update in range(config.updates):
        window = microbatches[update * config.accumulate :][: config.accumulate]
        count = sum((labels[:, 1:] != -100).sum() for _, labels in window)
        total = torch.zeros(())
        for batch, labels in window:
            with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
                logits = model.forward(batch[:, :-1]).float()
            losses = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
            if fault == "every microbatch has its own mean":
                losses = losses / (labels[:, 1:] != -100).sum() * count / config.accumulate
            total = total + losses / count
        optimizer.zero_grad()
        total.backward()
        if config.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        print({"update": update + 1, "loss": round(total.item(), 5)})


class DirectForward:
    name, version, policy = "model.forward(x)", "1", gpt.Policy()
    lacks = everything_but(
        "gpt-shape", "tied", "microbatches", "ignored-targets", "clip", "dropout", "bf16-mixed", reason="not in train()"
    )
    lacks |= {"float32-logits": "train() converts them, outside the model"}

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def train(self, recipe: Recipe) -> None:
        train(Config.of(recipe), self.fault)
