"""An update that is not finished: optimizers may step still, and master copies may still be copied back."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from conformance.recording.trace import Measures, Named, Step


@dataclass
class Open:
    """An update that is not finished: optimizers may step still."""

    before: Named[Tensor] = field(default_factory=Named)
    gradients: Named[Tensor | None] = field(default_factory=Named)
    state_before: dict[str, dict[str, Any]] = field(default_factory=dict)
    state_after: dict[str, dict[str, Any]] = field(default_factory=dict)
    after: Named[Tensor] = field(default_factory=Named)
    steps: list[Step] = field(default_factory=list)
    optimizers: list[Optimizer] = field(default_factory=list)
    stepped: set[tuple[int, int]] = field(default_factory=set)  # optimizers and tensors that were in a step
    late: dict[str, Tensor] = field(default_factory=dict)  # what is copied from master copies only after the step
    masters: Named[Tensor] = field(default_factory=Named)
    unfounded: bool = False
    measured_gradients: Measures | None = None
    measured_before: Measures | None = None
    measured_after: Measures | None = None


def in_step(optimizer: Optimizer) -> set[tuple[int, int]]:
    """Return what steps: the identities of the optimizer and of each tensor that it holds now."""
    return {(id(optimizer), id(tensor)) for group in optimizer.param_groups for tensor in group["params"]}


def unchanged(update: Open, after: Named[Tensor], measured: Measures | None) -> bool:
    """Return True if a step has moved nothing."""
    if measured is not None and update.measured_before is not None:
        return all(torch.equal(update.measured_before.bits[name], bits) for name, bits in measured.bits.items())
    return all(torch.equal(update.before[name], tensor) for name, tensor in after.items())


def joined(first: Measures | None, second: Measures | None) -> Measures | None:
    """Return the figures of both; where both have a tensor, those of the second."""
    if first is None or second is None:
        return first or second
    return Measures(Named({**first.norms, **second.norms}), Named({**first.bits, **second.bits}))
