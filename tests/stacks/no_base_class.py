"""An optimizer that derives from nothing: it has param_groups and step()."""

from typing import Any

import torch
from torch import Tensor, nn

from conformance import Recipe, everything_but
from tests.stacks import gpt
from tests.stacks.gpt import Config, cross_entropy


class Lion:
    """https://arxiv.org/abs/2302.06675"""

    def __init__(self, param_groups: list[dict[str, Any]], lr: float, weight_decay: float = 0.0) -> None:
        self.param_groups = [{"lr": lr, "weight_decay": weight_decay} | group for group in param_groups]
        self.momenta: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.momenta.setdefault(p, torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(momentum.lerp(p.grad, 0.1).sign_(), alpha=group["lr"])
                momentum.lerp_(p.grad, 0.01)


def train(config: Config, fault: str) -> None:
    torch.manual_seed(config.seed)
    model = gpt.GPT(**config.shape)
    groups = gpt.groups(model)
    if fault == "the head is left out":
        groups[0]["params"].pop()
    if fault == "vectors decay":
        del groups[1]["weight_decay"]
    optimizer = Lion(groups, **config.arguments)
    data = iter(config.batches)
    for update in range(config.updates):
        for group in optimizer.param_groups:
            group["lr"] = config.rate(update)
        for _ in range(config.accumulate):
            batch = next(data)
            (cross_entropy(model(batch[:, :-1]), batch[:, 1:]) / config.accumulate).backward()
        if config.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        model.zero_grad()


class NoBaseClass:
    name, version, policy = "an optimizer of its own", "1", gpt.Policy()
    claimed = ("gpt-shape", "tied", "microbatches", "clip", "schedule", "dropout")
    lacks = everything_but(*claimed, reason="train() has no such option")
    lacks |= {"any-optimizer": "only Lion"}

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def train(self, recipe: Recipe) -> None:
        train(Config.of(recipe), self.fault)
