"""Schedule-free optimizers, whose weights are at one point while they train and at an average while they are used.

Schedule-free optimizers (https://arxiv.org/abs/2405.15682) compute gradients at y and give the model x, an average of
what was trained. Their ``eval()`` moves the parameters from y to x, and ``train()`` back, which rounds. So the trainer
copies y before, and puts it back: evaluating and saving change no bit of a run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from reference.optimizers.roles import members


def has_modes(optimizer: Optimizer | type[Optimizer]) -> bool:
    """Return whether an optimizer (or its class) has a ``train()`` and an ``eval()`` mode, as schedule-free ones do."""
    return all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval"))


def with_modes(optimizer: Optimizer) -> list[Any]:
    """Return the schedule-free optimizers that make up this one."""
    return [member for member in members(optimizer) if has_modes(member)]


def to_training(optimizer: Optimizer) -> None:
    """Move the parameters of schedule-free optimizers to where their gradients are computed."""
    for member in with_modes(optimizer):
        member.train()


def to_average(optimizer: Optimizer) -> None:
    """Move the parameters of schedule-free optimizers to the average that the model is used with."""
    for member in with_modes(optimizer):
        member.eval()


@contextmanager
def averaged(optimizer: Optimizer) -> Iterator[None]:
    """Have the parameters at their average inside the block, and after it, bit for bit, where they were."""
    moved = [parameter for member in with_modes(optimizer) for parameter in tensors(member)]
    before = [parameter.detach().clone() for parameter in moved]
    to_average(optimizer)
    try:
        yield
    finally:
        to_training(optimizer)
        put(before, moved)


def tensors(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters of all groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@torch.no_grad()
def put(values: list[Tensor], parameters: list[Tensor]) -> None:
    """Copy values into parameters."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
