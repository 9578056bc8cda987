"""Dropout of a model: found among its modules and the probabilities that they hold, and switched off for a while."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

CHANCES = ("dropout", "dropout_p", "attention_dropout", "attn_dropout", "resid_dropout", "resid_pdrop", "attn_pdrop")
"""Attributes by which many modules pass a probability to functional dropout or attention."""


ATTENTION: Callable[..., Any] = torch.nn.functional.scaled_dot_product_attention
DROPPING: frozenset[Callable[..., Any]] = frozenset(
    {
        *(functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d),
        *(functional.alpha_dropout, functional.feature_alpha_dropout, ATTENTION),
    }
)
"""Functions of torch that drop at random."""


def chance(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    """Return the probability with which a call of one of DROPPING drops: 0 where it is off."""
    if function is ATTENTION:
        return float(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0))
    on = kwargs.get("training", args[2] if len(args) > 2 else function is not functional.alpha_dropout)
    return float(kwargs.get("p", args[1] if len(args) > 1 else 0.5)) if on else 0.0


def without_chance(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call of one of DROPPING, changed so that it drops nothing."""
    place, name = (4, "dropout_p") if function is ATTENTION else (1, "p")
    if len(args) > place:
        return (*args[:place], 0.0, *args[place + 1 :]), dict(kwargs)
    return tuple(args), {**kwargs, name: 0.0}


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
