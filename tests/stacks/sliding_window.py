"""Attention that looks back over a window of five tokens, its own included, in each layer."""

import torch
from torch import Tensor

from conformance import Recipe, everything_but
from tests.stacks import gpt, loop
from tests.stacks.gpt import Config

WINDOW = 5


class Windowed(gpt.GPT):
    fault = ""

    def mask(self, ids: Tensor) -> Tensor:
        back = torch.arange(ids.size(1)).unsqueeze(1) - torch.arange(ids.size(1))
        if self.fault == "the window does not reach the attention":
            return back >= 0
        return (back >= 0) & (back < (WINDOW - 1 if self.fault == "one token too short" else WINDOW))


class Policy(gpt.Policy):
    def context(self, recipe: Recipe) -> int:
        return recipe.n_layer * (WINDOW - 1) + 1


class SlidingWindow:
    name, version, policy = "sliding window", "1", Policy()
    claimed = ("gpt-shape", "tied", "microbatches", "dropout", "evaluate", "evaluate-every")
    lacks = everything_but(*claimed, reason="not in loop.train()")

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def train(self, recipe: Recipe) -> None:
        config = Config.of(recipe)
        model = loop.build(Windowed, config)
        model.fault = self.fault
        loop.train(model, config)
