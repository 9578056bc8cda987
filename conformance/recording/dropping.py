"""Dropout that keeps everything: a forward in training that is not random, and still shows where it drops."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# torch.nn.functional calls the first through torch._VF, whoever imported it; of the others it has the only name.
NATIVE = ("dropout", "dropout_", "feature_dropout", "feature_dropout_")


class Places:
    """Which call of dropout in an update is the one that may act."""

    def __init__(self, update: Callable[[], int] | None) -> None:
        """Begin; ``update`` returns the number of updates done. None: no call may act."""
        self.update = update
        self.calls = self.last = 0

    def acts(self, x: Tensor) -> bool:
        """Count a call that drops from ``x``, and return whether it may act: call n in update n, both from 0."""
        if self.update is None or isinstance(x, torch.nn.Parameter):  # of weights there is one mask for all sequences
            return False
        update = self.update()
        self.calls = self.calls + 1 if update == self.last else 1
        self.last = update
        return self.calls - 1 == update


@contextlib.contextmanager
def everything_kept(but_for: Callable[[], int] | None = None) -> Iterator[None]:
    """Have torch's dropout keep every element inside the block, scaled by 1 / (1 - p) as those that it keeps.

    Seen are torch.nn.Dropout, its variants for whole channels, torch.nn.functional.dropout, and the dropout inside
    scaled_dot_product_attention. Dropout that a stack writes itself, from random numbers, stays as it is.

    Args:
        but_for: returns the number of updates done: in update n, from 0, the n-th call of dropout acts. None: in no
            update does any.
    """
    places = Places(but_for)
    functional: Any = torch.nn.functional
    attention: Callable[..., Tensor] = functional.scaled_dot_product_attention

    def stand_in(native: Callable[..., Tensor], inplace: bool) -> Callable[..., Tensor]:
        def kept(x: Tensor, p: float, train: bool) -> Tensor:
            if not train or not 0.0 < p < 1.0:
                return x
            if places.acts(x):
                return native(x, p, train)
            return x.div_(1.0 - p) if inplace else x / (1.0 - p)

        return kept

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, *args: Any,
               **kwargs: Any) -> Tensor:  # fmt: skip
        drops = 0.0 < dropout_p < 1.0
        if drops and places.acts(query):
            return attention(query, key, value, attn_mask, dropout_p, *args, **kwargs)
        mixed = attention(query, key, value, attn_mask, 0.0, *args, **kwargs)
        return mixed / (1.0 - dropout_p) if drops else mixed  # the weights are linear in it

    with contextlib.ExitStack() as stack:
        for owner in (torch, torch._VF):
            for name in NATIVE:
                stack.enter_context(replaced(owner, name, stand_in(getattr(owner, name), name.endswith("_"))))
        stack.enter_context(replaced(functional, "scaled_dot_product_attention", attend))
        yield


@contextlib.contextmanager
def replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Have another function stand under a name inside the block."""
    own = name in vars(owner)
    original = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, original)
        else:  # torch._VF looks it up each time
            delattr(owner, name)
