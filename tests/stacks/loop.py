"""A loop for the stacks whose model is what is special about them."""

from typing import TypeVar

import torch

from tests.stacks import gpt
from tests.stacks.gpt import Config, cross_entropy

Model = TypeVar("Model", bound=gpt.GPT)


def train(model: gpt.GPT, config: Config) -> None:
    optimizer = config.optimizer(gpt.groups(model), **config.arguments)
    data = iter(config.batches)
    for update in range(config.updates):
        for _ in range(config.accumulate):
            batch = next(data)
            loss = cross_entropy(model(batch[:, :-1]), batch[:, 1:])
            (loss / config.accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
        if config.evaluates(update + 1):
            print(f"step {update + 1}: val loss {gpt.evaluate(model, config.validation):.6f}")


def build(kind: type[Model], config: Config) -> Model:
    torch.manual_seed(config.seed)
    return kind(**config.shape)
