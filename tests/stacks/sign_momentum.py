"""Lion steps by the sign of its momentum (arXiv:2302.06675), so a NaN there shows in no weight: sign(NaN) is 0."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from conformance import Recipe, everything_but
from tests.stacks import gpt
from tests.stacks.gpt import Config, cross_entropy


class Lion(torch.optim.Optimizer):
    """Without weight decay."""

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-3, beta: float = 0.9, average: float = 0.99) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "average": average})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override] # it takes no closure
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                direction = torch.lerp(parameter.grad, momentum, group["beta"]).sign()
                parameter.sub_(direction, alpha=group["lr"])
                momentum.lerp_(parameter.grad, 1 - group["average"])


def train(config: Config, fault: str) -> None:
    torch.manual_seed(config.seed)
    model = gpt.GPT(**config.shape)
    optimizer = Lion(model.parameters())
    data = iter(config.batches)
    for _update in range(config.updates):
        for _ in range(config.accumulate):
            batch = next(data)
            (cross_entropy(model(batch[:, :-1]), batch[:, 1:]) / config.accumulate).backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if fault != "the guard is lost" and not norm.isfinite():
            raise FloatingPointError("the gradient is not finite")
        optimizer.step()
        if fault != "gradients add up":
            optimizer.zero_grad()


class Policy(gpt.Policy):
    def decays(self, recipe: Recipe, tensor: Any) -> bool:
        return False

    def learning_rate(self, recipe: Recipe, update: int) -> float:
        return 1e-3


class SignMomentum:
    name, version, policy = "sign of momentum", "1", Policy()
    claimed = ("gpt-shape", "tied", "microbatches", "dropout")
    lacks = everything_but(*claimed, reason="not in train()")
    lacks |= {"any-optimizer": "Lion is fixed", "keywords": "Lion is fixed", "float32-logits": "computes in float32"}

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def train(self, recipe: Recipe) -> None:
        train(Config.of(recipe), self.fault)
