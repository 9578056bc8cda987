"""Optimizers that step inside the step of another one, and which of them did the work.

torchtitan's OptimizersContainer is an optimizer itself. It has groups of its own, whose rates no schedule changes, and
hands its step on to the optimizers that it holds: what those are told counts. But one that ZeroRedundancyOptimizer
holds has the share of one process only, and Lookahead (arXiv:1907.08610) moves the weights once more: there the outer
one counts.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from conformance.recording.trace import Named, Step
from conformance.recording.unseen import sure
from conformance.recording.weights import Weights


class Worker(NamedTuple):
    """An optimizer that steps, with what it started from."""

    optimizer: Optimizer
    step: Step
    state: dict[str, dict[str, Any]]
    """By tensor, before the step."""


class Inner:
    """The optimizers inside the step that is running."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.workers: list[Worker] = []
        self.left: Named[Tensor] = Named()

    def begins(self, worker: Worker) -> None:
        """One begins its step. If it steps twice, the first counts."""
        if all(worker.optimizer is not known.optimizer for known in self.workers):
            self.workers.append(worker)

    def ends(self, tensors: Mapping[str, Tensor]) -> None:
        """One has ended its step and left these tensors."""
        self.left = self.weights.keep(tensors)

    def all_done(self, outer: Worker, now: Mapping[str, Tensor]) -> list[Worker]:
        """Return who did the work of the outer step that has ended: those inside it, or it alone. Forget them.

        Args:
            outer: the optimizer whose step has ended.
            now: what was kept of the tensors after it.
        """
        inside, left = self.workers, self.left
        self.workers, self.left = [], Named()
        held = {id(tensor) for worker in inside for tensor in tensors_of(worker.optimizer)}
        if not inside or not {id(tensor) for tensor in tensors_of(outer.optimizer)} <= held:
            return [outer]
        untouched = all(torch.equal(sure(left[name]), sure(value)) for name, value in now.items() if name in left)
        return inside if untouched else [outer]


def tensors_of(optimizer: Optimizer) -> list[Tensor]:
    """Return the tensors that an optimizer holds."""
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]
