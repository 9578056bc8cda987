"""What the tests of optimizers share: a tiny GPT, updates with given gradients, and names."""

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from reference.config import GPTConfig
from reference.model.gpt import GPT

CPU = torch.device("cpu")
OF_TORCH = {
    **{name: {} for name in ("SGD", "Adam", "AdamW", "Adagrad", "NAdam", "RAdam", "Adamax", "RMSprop")},
    **{name: {} for name in ("ASGD", "Rprop", "Adafactor")},
    "SGD, momentum": {"momentum": 0.9},
    "Adadelta": {"lr": 50.0},
}


def gpt(**changes: Any) -> GPT:
    shape = {"vocab_size": 16, "block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 8}
    return GPT(GPTConfig.gpt2(**(shape | changes)))


def take_steps(model: nn.Module, optimizer: Optimizer, count: int) -> None:
    """Updates with gradients that differ from tensor to tensor and from step to step."""
    for step in range(count):
        for index, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(10 * index + step))
            parameter.grad = noise.to(parameter.dtype)
        optimizer.step()
