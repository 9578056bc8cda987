"""A model that is given ids and targets, and returns nothing but its loss, as nanochat's does."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conformance import Recipe, everything_but
from tests.stacks import gpt
from tests.stacks.gpt import Config


class Model(gpt.GPT):
    fault = ""

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:  # type: ignore[override] # (B, T), (B, T) -> ()
        logits = super().forward(ids).float()
        if self.fault == "the target is the token itself":
            targets = ids
        if self.fault == "the loss is computed in bfloat16":
            with torch.autocast("cpu", enabled=False):
                return F.cross_entropy(logits.bfloat16().flatten(0, 1), targets.flatten()).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train(config: Config, fault: str) -> None:
    torch.manual_seed(config.seed)
    model = Model(**config.shape)
    model.fault = fault
    optimizer = config.optimizer(gpt.groups(model), **config.arguments)
    data = iter(config.batches)
    for update in range(config.updates):
        for group in optimizer.param_groups:
            group["lr"] = config.rate(update)
        losses = []
        for _ in range(config.accumulate):
            batch = next(data)
            with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
                loss = model(batch[:, :-1], batch[:, 1:])
            losses.append(loss.detach())
            (loss if fault == "losses are summed" else loss / config.accumulate).backward()
        if config.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print(f"step {update + 1:05d}/{config.updates:05d} | loss: {torch.stack(losses).mean():.6f}")
        if config.evaluates(update + 1):
            model.eval()
            with torch.inference_mode():
                mean = sum(model(rows[:, :-1], rows[:, 1:]) for rows in config.validation) / len(config.validation)
            model.train()
            print(f"Step {update + 1:05d} | Validation loss: {mean:.6f}")


class LossOnly:
    name, version, policy = "loss only", "1", gpt.Policy()
    claimed = ("gpt-shape", "tied", "microbatches", "clip", "schedule", "dropout", "evaluate", "evaluate-every")
    lacks = everything_but(*claimed, "bf16-mixed", reason="train() has no such option")

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def train(self, recipe: Recipe) -> None:
        train(Config.of(recipe), self.fault)
