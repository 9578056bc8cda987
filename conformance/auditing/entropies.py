"""Cross entropies of a run: those of training, or those of the audit's own forward where compiled code hides them."""

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from conformance.auditing.facts import Facts, Given
from conformance.errors import NotApplicable
from conformance.recording.trace import CrossEntropy

ROWS = 8
UNSEEN = "the audit saw no cross entropy: the run computes it in compiled code, or not by PyTorch's function"


def describe_input(name: str, given: Any, backward: int, figures: bool = True) -> Given | None:
    """Return figures of what a cross entropy was given, or no more than its dtype; None if it is not a matrix."""
    if not isinstance(given, Tensor) or given.ndim != 2 or hasattr(given, "placements"):
        return None
    if not figures:
        return Given(backward, name, given.dtype)
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


def entropies_by_backward(facts: Facts) -> list[list[CrossEntropy]]:
    """Return the cross entropies that each backward pass was given, in order. Raises NotApplicable if unclear."""
    found: list[list[CrossEntropy]] = [[] for _ in facts.backwards]
    if not facts.trace.entropies:
        raise NotApplicable(UNSEEN)
    for entropy, given in zip(facts.trace.entropies, facts.given, strict=True):
        if given is None:
            raise NotApplicable("a cross entropy was computed from something else than a matrix of logits")
        if entropy.grad_enabled and given.backward < len(found):
            found[given.backward].append(entropy)
    if not all(found):
        raise NotApplicable("some backward passes begin without a cross entropy before them")
    for entropies in found:
        if len(entropies) > 1 and any(entropy.reduction != "sum" for entropy in entropies):
            raise NotApplicable("several cross entropies belong to one backward pass")
    if any(e.label_smoothing or e.reduction == "none" for entropies in found for e in entropies):
        raise NotApplicable("the loss weighs or smooths its targets by itself")
    return found


def shares(facts: Facts) -> list[list[tuple[float, int]]]:
    """Return, for each update and each of its backward passes, the weight of a target in the loss, and their number."""
    found = entropies_by_backward(facts)
    result: list[list[tuple[float, int]]] = [[] for _ in facts.updates]
    for backward, entropies in zip(facts.backwards, found, strict=True):
        counted = sum(entropy.counted for entropy in entropies)
        total = sum(entropy.total for entropy in entropies)
        loss = sum(loss.item() for loss in backward.losses)
        if not counted or not total or not math.isfinite(loss):
            raise NotApplicable("a loss is zero or not finite")
        if backward.update < len(result):
            result[backward.update].append((loss / total, counted))
    return [update for update in result if update]


def weights(facts: Facts) -> list[list[tuple[float, int]]]:
    """Return the same for a process that told it; empty if it cannot be said."""
    if facts.weights:
        return facts.weights
    with contextlib.suppress(NotApplicable, ValueError):
        return shares(facts)
    return []
