"""Embeddings and head learn at half the rate of the blocks, through LambdaLR."""

from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from conformance import Recipe, TensorInfo, everything_but
from tests.stacks import gpt
from tests.stacks.gpt import Config, cross_entropy


def slow(name: str) -> bool:
    return name.startswith(("tokens.", "positions.", "head."))


def train(config: Config, fault: str) -> None:
    torch.manual_seed(config.seed)
    model = gpt.GPT(**config.shape)
    named, peak = list(model.named_parameters()), config.arguments["lr"]
    fast = [p for n, p in named if not slow(n)]
    decays = {"params": [p for p in fast if p.ndim >= 2]}
    vectors = {"params": [p for p in fast if p.ndim < 2], "weight_decay": 0.0}
    tables: dict[str, Any] = {"params": [p for n, p in named if slow(n)], "lr": peak / 2}
    optimizer = config.optimizer([decays, tables, vectors], **config.arguments)
    scheduler = LambdaLR(optimizer, lambda update: config.rate(update) / peak if peak else 1.0)
    data = iter(config.batches)
    for update in range(config.updates):
        if fault == "the schedule has one rate for all":
            for group in optimizer.param_groups:
                group["lr"] = config.rate(update)
        total = 0.0
        for _ in range(config.accumulate):
            batch = next(data)
            loss = cross_entropy(model(batch[:, :-1]), batch[:, 1:]) / config.accumulate
            loss.backward()
            total += loss.item()
        norm = torch.zeros(())
        if config.clip is not None and fault == "each group is clipped by itself":
            for group in optimizer.param_groups:
                norm = nn.utils.clip_grad_norm_(group["params"], config.clip)
        elif config.clip is not None:
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        print(f"{update + 1}: loss {total:.5f}, lr {scheduler.get_last_lr()[0]:.5e}, grad_norm {norm:.5f}")
        scheduler.step()
        optimizer.zero_grad()


class Policy(gpt.Policy):
    def rate(self, recipe: Recipe, update: int, tensor: TensorInfo) -> float:
        return self.learning_rate(recipe, update) / (2 if slow(tensor.name) else 1)


class GroupRates:
    name, version, policy = "rates per group", "1", Policy()
    lacks = everything_but("gpt-shape", "tied", "microbatches", "clip", "schedule", "dropout", reason="not in train()")

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def train(self, recipe: Recipe) -> None:
        train(Config.of(recipe), self.fault)
