"""Token files for tests, and what is read from them."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import numpy as np
from torch import Tensor

from reference.data import TokenData, write_tokens
from reference.data.tokenfile import Ids

END = 999


def write(folder: Path, documents: Iterable[Ids], split: str = "train", vocab_size: int = 1000, end: int = END) -> Path:
    return write_tokens(folder, split, documents, vocab_size=vocab_size, tokenizer="bytes", end_of_document=end)


def counting(folder: Path, tokens: int) -> Path:
    """A split whose token i has the id i: every position can be told."""
    write_tokens(
        folder, "train", [np.arange(tokens - 1)], vocab_size=tokens, tokenizer="bytes", end_of_document=tokens - 1
    )
    return folder


def opened(
    folder: Path, block_size: int = 4, microbatch_size: int = 2, seed: int = 1, split: str = "train"
) -> TokenData:
    return TokenData(folder, split, block_size=block_size, microbatch_size=microbatch_size, seed=seed)


def taken(data: TokenData, number: int, start: int = 0, rank: int = 0, world_size: int = 1) -> list[Tensor]:
    batches = list(itertools.islice(data.batches_from(start, rank, world_size), number))
    assert all(isinstance(batch, Tensor) for batch in batches)
    return cast("list[Tensor]", batches)


def windows(batches: Iterable[Tensor], block_size: int) -> list[int]:
    """Which window each row is, of a file of :func:`counting`."""
    return [int(row[0]) // block_size for batch in batches for row in batch]
