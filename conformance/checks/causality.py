"""Rules of what a logit depends on."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from conformance.checks.comparison import largest_difference
from conformance.errors import Violation, quoted


def looks_back_only(model: Callable[[Tensor], Any], ids: Tensor, bound: float = 0.0) -> None:
    """Check that no logit depends on a later token.

    The logits of the first half must stay as they are when the second half of the tokens changes.

    >>> looks_back_only(torch.nn.Embedding(8, 8), torch.tensor([[1, 2, 3, 4]]))

    Args:
        model: token ids (B, T) to logits (B, T, V), or to an object that has them as ``logits``. Call ``eval()``
            before: dropout would change them, too.
        ids: (B, T), int64, with two tokens or more per sequence, not all the same.
        bound: by how much a logit may differ all the same. 0 is right on the CPU in float32; a compiled model, or a
            flash kernel in 16 bits, may need 1e-3.

    Raises:
        Violation: with the places of the logits that changed.
        ValueError: for ids that cannot be altered.
    """
    if ids.ndim != 2 or ids.size(1) < 2 or int(ids.min()) == int(ids.max()):
        raise ValueError(f"ids of shape {tuple(ids.shape)}: give (B, T) with T of at least 2, and different tokens.")
    half = ids.size(1) // 2
    others = ids.clone()
    others[:, half:] = (others[:, half:] + 1) % (int(ids.max()) + 1)
    with torch.no_grad():
        before, after = (getattr(given, "logits", given) for given in (model(ids), model(others)))
    earlier_unchanged(before, after, half, bound)


def earlier_unchanged(before: Tensor, after: Tensor, until: int, bound: float = 0.0, where: str = "") -> None:
    """Check that the logits before a place stay the same if only the tokens from there on change.

    Args:
        before: (B, T, V).
        after: (B, T, V), with other tokens from ``until`` on.
        until: the place, from 0.
        bound: largest absolute difference allowed.
        where: begins the message.

    Raises:
        Violation: if one of them differs by more, or is NaN.
    """
    difference = (before[:, :until].double() - after[:, :until].double()).abs()
    wrong = ~(difference <= bound)
    if wrong.any():
        places = wrong.any(dim=-1).any(dim=0).nonzero().flatten().tolist()
        raise Violation(
            f"{where}logits before token {until} stay the same if that token and later ones change",
            f"they change at {quoted(places)}, by up to {largest_difference(before[:, :until], after[:, :until])}",
        )
