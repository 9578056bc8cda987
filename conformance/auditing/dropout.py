"""Dropout of a model: found among its modules and the probabilities that they hold, and switched off for a while."""

import contextlib
from collections.abc import Iterator

from torch import nn

CHANCES = ("dropout", "dropout_p", "attention_dropout", "attn_dropout", "resid_dropout", "resid_pdrop", "attn_pdrop")
"""Attributes by which many modules pass a probability to functional dropout or attention."""


def chances_of(module: nn.Module) -> dict[str, float]:
    """Return the probabilities above 0 by which a module drops, by the name of the attribute."""
    names = (*CHANCES, "p") if isinstance(module, nn.modules.dropout._DropoutNd) else CHANCES
    found = {name: getattr(module, name, None) for name in names}
    return {name: value for name, value in found.items() if isinstance(value, float) and 0 < value < 1}


@contextlib.contextmanager
def dropout_off(root: nn.Module) -> Iterator[None]:
    """Set all probabilities to 0 inside the block."""
    kept = [(part, name, value) for part in root.modules() for name, value in chances_of(part).items()]
    for part, name, _ in kept:
        setattr(part, name, 0.0)
    try:
        yield
    finally:
        for part, name, value in kept:
            setattr(part, name, value)
