"""Updates whose gradient is not the plain sum of their backward passes, by design."""

import math

import torch

from conformance.auditing.facts import Facts

SPREAD = 0.02
"""Relative: a gradient that was only scaled has one factor for all tensors, up to rounding."""
BY_HAND = (
    "gradients are cleared between the backward passes of an update, and the gradient of the step is another one than "
    "the last pass left: the script makes it by itself, as clipping per sample does"
)
TWICE = "the passes of an update run the same data twice and keep the second gradient, as SAM does"


def special(facts: Facts, number: int) -> str:
    """Return why an update's gradient need not be the sum over its passes; empty if it should be."""
    if all(update != number for update, _ in facts.noticed.cleared):
        return ""
    if runs_twice(facts, number):
        return TWICE
    return BY_HAND if made_by_hand(facts, number) else ""


def runs_twice(facts: Facts, number: int) -> bool:
    """Return True if the second half of an update's forwards gets the ids of the first half again."""
    ids = [forward.ids for forward in facts.trace.training_forwards(number)]
    first, second = ids[: len(ids) // 2], ids[len(ids) // 2 :]
    return bool(first) and len(first) == len(second) and all(map(torch.equal, first, second))


def made_by_hand(facts: Facts, number: int) -> bool:
    """Return True if the step's gradient is not what the last backward left, times one factor for all tensors."""
    passes = [backward.norms for backward in facts.backwards if backward.update == number]
    measured = facts.updates[number].measured_gradients
    values_clipped = any(clip.update == number and clip.kind == "value" for clip in facts.clips)
    if not passes or measured is None or facts.world > 1 or values_clipped:
        return False
    pairs = [(measured.norms[name].item(), norm.item()) for name, norm in passes[-1].items() if name in measured.norms]
    factors = [reached / ended for reached, ended in pairs if ended > 0 and math.isfinite(reached / ended)]
    return bool(factors) and max(factors) > (1 + SPREAD) * min(factors)
