"""Loop and adapter in one file; the loop refuses gradients that are not finite, and keywords that do not exist."""

import difflib
import inspect
import math

import torch
from torch import nn

from conformance import Recipe, everything_but
from tests.stacks import gpt
from tests.stacks.gpt import Config, cross_entropy


class Refusing:
    name, version, policy = "refuses by itself", "1", gpt.Policy()
    lacks = everything_but("gpt-shape", "tied", "clip", "dropout", reason="train() has no such option")

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def train(self, recipe: Recipe) -> None:
        config = Config.of(recipe)
        torch.manual_seed(config.seed)
        model = gpt.GPT(**config.shape)
        optimizer = self.build_optimizer(config, model)
        for batch in config.batches:
            loss = cross_entropy(model(batch[:, :-1]), batch[:, 1:])
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf)
            if self.fault == "the check comes after the step":
                optimizer.step()
            if not norm.isfinite():
                raise FloatingPointError(f"the gradient's norm is {norm}, at a loss of {loss.item()}")
            if self.fault != "the check comes after the step":
                optimizer.step()
            optimizer.zero_grad()

    def build_optimizer(self, config: Config, model: nn.Module) -> torch.optim.Optimizer:
        accepted = inspect.signature(config.optimizer).parameters
        arguments = dict(config.arguments)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values()):
            for name in set(arguments) - set(accepted):
                if self.fault == "unknown keywords are dropped":
                    del arguments[name]
                    continue
                nearest = difflib.get_close_matches(name, accepted, n=1, cutoff=0)[0]
                raise ValueError(f"the optimizer has no keyword {name}. Did you mean {nearest}?")
        return config.optimizer(gpt.groups(model), **arguments)
