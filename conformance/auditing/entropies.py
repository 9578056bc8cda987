"""Cross entropies of a run: those of training, or those of the audit's own forward where compiled code hides them."""

from typing import Any

import torch
from torch import Tensor

from conformance.auditing.facts import Facts, Given
from conformance.errors import NotApplicable
from conformance.recording.trace import CrossEntropy

ROWS = 8
UNSEEN = "the audit saw no cross entropy: the run computes it in compiled code, or not by PyTorch's function"


def describe_input(name: str, given: Any, backward: int) -> Given | None:
    """Return figures of what a cross entropy was given."""
    if not isinstance(given, Tensor) or given.ndim != 2 or hasattr(given, "placements"):
        return None
    with torch.no_grad(), torch._C.DisableTorchFunction():
        rows = given.detach()[:ROWS].float()
        return Given(backward, name, given.dtype, rows.min(), rows.sum(-1), rows.logsumexp(-1))


def of_training(facts: Facts) -> list[tuple[CrossEntropy, Given | None, Tensor | None]]:
    """Return the cross entropies of training, with what they were given, and the token ids where they are known.

    Raises:
        NotApplicable: if none was seen.
    """
    found: list[tuple[CrossEntropy, Given | None, Tensor | None]] = [
        (entropy, given, None)
        for entropy, given in zip(facts.trace.entropies, facts.given, strict=True)
        if entropy.grad_enabled
    ]
    found = found or [*facts.probed.entropies]
    if not found:
        raise NotApplicable(UNSEEN)
    return found
