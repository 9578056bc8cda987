"""A z-loss of 1e-4 keeps the logits small (PaLM, section 5)."""

import torch
from torch import nn

from conformance import Recipe, everything_but
from tests.stacks import gpt
from tests.stacks.gpt import Config, cross_entropy


def train(config: Config, fault: str) -> None:
    torch.manual_seed(config.seed)
    model = gpt.GPT(**config.shape)
    optimizer = config.optimizer(gpt.groups(model), **config.arguments)
    data = iter(config.batches)
    for update in range(config.updates):
        for group in optimizer.param_groups:
            group["lr"] = config.rate(update)
        total = 0.0
        for _ in range(config.accumulate):
            batch = next(data)
            with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
                logits = model(batch[:, :-1])
            if fault != "the loss is computed in bfloat16":
                logits = logits.float()
            z_loss = 1e-4 * logits.logsumexp(-1).square().mean()
            entropy = cross_entropy(logits, batch[:, 1:])
            if fault == "the z-loss is not divided":
                z_loss = z_loss * config.accumulate
            loss = (entropy + z_loss) / config.accumulate
            loss.backward()
            total += loss.item()
        if config.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        print(f"update {update + 1}: loss {total:.6f}, lr {config.rate(update):.6g}")


class Policy(gpt.Policy):
    def auxiliary_loss(self, recipe: Recipe) -> bool:
        return True


class ZLoss:
    name, version, policy = "z-loss", "1", Policy()
    claimed = ("gpt-shape", "tied", "microbatches", "clip", "schedule", "dropout", "bf16-mixed")
    lacks = everything_but(*claimed, reason="not in train()")
    lacks |= {"float32-logits": "the loss converts them"}

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def train(self, recipe: Recipe) -> None:
        train(Config.of(recipe), self.fault)
