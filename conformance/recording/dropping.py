"""Dropout that keeps everything: a forward in training that is not random, and still shows where it drops."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# torch.nn.functional calls the first through torch._VF, whoever imported it; of the others it has the only name.
NATIVE = ("dropout", "dropout_", "feature_dropout", "feature_dropout_")


@contextlib.contextmanager
def everything_kept() -> Iterator[None]:
    """Have torch's dropout keep every element inside the block, scaled by 1 / (1 - p) as those that it keeps.

    Seen are torch.nn.Dropout, its variants for whole channels, torch.nn.functional.dropout, and the dropout inside
    scaled_dot_product_attention. Dropout that a stack writes itself, from random numbers, stays as it is.
    """
    functional: Any = torch.nn.functional
    attention: Callable[..., Tensor] = functional.scaled_dot_product_attention

    def kept(x: Tensor, p: float, train: bool) -> Tensor:
        return x / (1.0 - p) if train and 0.0 < p < 1.0 else x

    def kept_(x: Tensor, p: float, train: bool) -> Tensor:
        return x.div_(1.0 - p) if train and 0.0 < p < 1.0 else x

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, *args: Any,
               **kwargs: Any) -> Tensor:  # fmt: skip
        mixed = attention(query, key, value, attn_mask, 0.0, *args, **kwargs)
        return mixed / (1.0 - dropout_p) if 0.0 < dropout_p < 1.0 else mixed  # the weights are linear in it

    with contextlib.ExitStack() as stack:
        for owner in (torch, torch._VF):
            for name in NATIVE:
                stack.enter_context(replaced(owner, name, kept_ if name.endswith("_") else kept))
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
