"""LBFGS, whose closure computes loss and gradient several times in each step."""

import torch
from torch import Tensor

from conformance import Recipe, TensorInfo, everything_but
from tests.stacks import gpt
from tests.stacks.gpt import Config, cross_entropy


def train(config: Config, fault: str) -> None:
    torch.manual_seed(config.seed)
    model = gpt.GPT(**config.shape)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    size = config.accumulate
    for update in range(config.updates):
        optimizer.param_groups[0]["lr"] = config.rate(update)
        window = config.batches[update * size : (update + 1) * size]

        def closure(window: list[Tensor] = window) -> float:
            if fault != "gradients add up over evaluations":
                optimizer.zero_grad()
            total = 0.0
            for batch in window[:1] if fault == "the first microbatch only" else window:
                loss = cross_entropy(model(batch[:, :-1]), batch[:, 1:]) / len(window)
                loss.backward()
                total += loss.item()
            return total

        loss = optimizer.step(closure)
        print(f"iteration {update + 1}: loss {loss:.6f}")
        if config.evaluates(update + 1):
            print(f"iteration {update + 1}: validation loss {gpt.evaluate(model, config.validation):.6f}")


class Policy(gpt.Policy):
    def decays(self, recipe: Recipe, tensor: TensorInfo) -> bool:
        return False


class Lbfgs:
    name, version, policy = "LBFGS", "1", Policy()
    claimed = ("gpt-shape", "tied", "microbatches", "schedule", "evaluate", "evaluate-every")
    lacks = everything_but(*claimed, reason="train() has no such option")
    lacks |= {"any-optimizer": "only LBFGS", "keywords": "only the rate can be set"}

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def train(self, recipe: Recipe) -> None:
        train(Config.of(recipe), self.fault)
