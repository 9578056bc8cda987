"""Sequences from token files: opened in milliseconds whatever their size, in another order every epoch.

Sequences are windows of block_size + 1 tokens that overlap by one: every token but the first is a target exactly once.
reference/data/tokenfile.py says what a data folder holds; ``python -m reference prepare`` writes one.
"""

import functools
import hashlib
import itertools
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reference.config import IGNORE
from reference.data.sidecar import MASKED_FORMAT, open_sidecar
from reference.errors import ConfigurationError, DataError

Batch = Tensor | tuple[Tensor, Tensor]
"""Token ids (B, T + 1), or ids (B, T) and targets (B, T)."""
ROUNDS = 64  # of the shuffle; from 12 on no statistic of tests/reference/test_data.py tells it from a random order
LOOKAHEAD = 1024  # samples whose places are computed at once: 0.8 ms for 1024 of them, 0.6 ms for one


class TokenData:
    """One split of a data folder, memory-mapped.

    Opening reads the sidecar and at most 256 KiB of the token file, however large that is. It catches a file that is
    truncated, extended, of another split or preparation, or described by an edited sidecar; a few flipped bits in a
    large file are only caught by :meth:`verify`, which reads all of it.

    Args:
        path: the data folder.
        split: ``train`` or ``validation``.
        block_size: T, targets per sequence.
        microbatch_size: B, sequences per microbatch and rank.
        seed: of the order of the sequences.

    Raises:
        DataError: if the files are missing, damaged, or do not belong together.
        ConfigurationError: if a size is not positive.
    """

    def __init__(self, path: str | Path, split: str, *, block_size: int, microbatch_size: int, seed: int) -> None:
        if block_size < 1 or microbatch_size < 1:
            raise ConfigurationError(
                f"block_size is {block_size} and microbatch_size {microbatch_size}, but both must be at least 1."
            )
        self.folder = Path(path)
        self.split = split
        self.block_size = block_size
        self.microbatch_size = microbatch_size
        self.seed = seed
        self.sidecar = open_sidecar(self.folder, split)
        self.vocab_size = self.sidecar.vocab_size
        self.tokens = self.sidecar.tokens
        self.documents = self.sidecar.documents
        self.tokenizer = self.sidecar.tokenizer
        self.end_of_document = self.sidecar.end_of_document
        self.sequences = (self.tokens - 1) // block_size
        """N: full windows, which are the samples of one epoch."""
        self.unused = self.tokens - 1 - self.sequences * block_size
        """Tokens at the end of the file that fill no window: never a target in training, but in :meth:`once`."""
        tokenizer_file = self.folder / "tokenizer.json"
        self.tokenizer_file = tokenizer_file if self.sidecar.tokenizer == tokenizer_file.name else None
        self.dtype = np.dtype(self.sidecar.dtype).newbyteorder("<")
        self.ids: npt.NDArray[Any] = mapped(self.folder / f"{split}.bin", self.dtype)
        """All ids, (tokens,), mapped and not to be written to."""
        masked = self.sidecar.format == MASKED_FORMAT
        self.mask: npt.NDArray[Any] | None = (
            mapped(self.folder / f"{split}.mask", np.dtype(np.bool_)) if masked else None
        )
        """For each id whether it is a target, (tokens,), of a split of chats; None where all are."""

    def __reduce__(self) -> tuple[Any, ...]:
        # NOTE a footgun: pickling a memmap copies all of the file. Another process opens (and checks) it itself.
        again = functools.partial(
            TokenData, block_size=self.block_size, microbatch_size=self.microbatch_size, seed=self.seed
        )
        return again, (self.folder, self.split)

    def describe(self) -> str:
        """Return one line: what is used, and what is not."""
        sidecar = self.sidecar
        return (
            f"{self.split}: {self.tokens:,} tokens of {self.documents:,} document{'s' * (self.documents != 1)} in "
            f"{self.folder} ({sidecar.tokenizer}, vocabulary {self.vocab_size:,}, {sidecar.dtype}); "
            f"{self.sequences:,} sequences of {self.block_size} per epoch; "
            f"the last {self.unused:,} tokens do not fill one and are left out"
            + ("" if sidecar.targets is None else f"; {sidecar.targets:,} tokens are targets")
        )

    def batches_from(self, start: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yield microbatches of this rank without end, beginning with number ``start``.

        Sample n of the run, counted over all ranks and epochs, is place n mod N in the order of epoch n // N.
        Microbatch m of rank r holds samples (m * world_size + r) * B and the B - 1 behind it: the ranks never share
        one, every sequence is seen once per epoch, nothing is dropped where an epoch ends, and a run resumed on
        another number of ranks goes on where it was. Costs the same wherever it starts.

        Yields:
            token ids (B, T + 1), int64, on the CPU. Of a split of chats, ids and targets (B, T) each: the targets are
            -100 where the loss leaves them out.

        Raises:
            DataError: if there are fewer tokens than one sequence has.
            ConfigurationError: if there is no such start or rank.
        """
        check_rank(rank, world_size)
        if start < 0:
            raise ConfigurationError(f"the first microbatch is number {start}, but they are counted from 0.")
        if not self.sequences:
            raise DataError(
                f"{self.folder / self.split}.bin holds {self.tokens} tokens, but a sequence needs "
                f"{self.block_size + 1}: choose a smaller block_size, or prepare more text."
            )
        return self.microbatches(start, rank, world_size)

    def microbatches(self, start: int, rank: int, world_size: int) -> Iterator[Batch]:
        """See :meth:`batches_from`."""
        size, length = self.microbatch_size, self.block_size
        ahead = max(1, min(LOOKAHEAD, self.sequences) // size)
        for first in itertools.count(start, ahead):
            numbers = (np.arange(first, first + ahead)[:, None] * world_size + rank) * size + np.arange(size)
            for windows in self.places(numbers.reshape(-1)).reshape(ahead, size).tolist():
                rows = [self.ids[window * length : window * length + length + 1] for window in windows]
                ids = self.within_vocabulary(np.stack(rows))
                if self.mask is None:
                    yield ids
                else:
                    kept = [self.mask[window * length + 1 : window * length + length + 1] for window in windows]
                    yield ids[:, :-1], ids[:, 1:].masked_fill(~torch.from_numpy(np.stack(kept)), IGNORE)

    def within_vocabulary(self, ids: npt.NDArray[Any]) -> Tensor:
        """Return ids of the file as int64; raise DataError if one is beyond the vocabulary.

        Here, per batch (1 us for 8 x 1024 ids) and before they reach a device, where an id without a row ends in an
        assertion that names neither file nor remedy. Opening the file does not read all of it.
        """
        if (high := int(ids.max())) >= self.vocab_size:
            raise DataError(
                f"{self.folder / self.split}.bin is damaged: it holds the token id {high}, but the vocabulary that "
                f"{self.split}.json states has {self.vocab_size}; copy it again, or prepare the text again."
            )
        return torch.from_numpy(ids.astype(np.int64))

    def places(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the windows that these samples of the run are, (n,) in and out, int64."""
        epochs, positions = np.divmod(numbers, self.sequences)
        windows = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            windows[here] = shuffled(positions[here], self.sequences, self.seed, epoch)
        return windows

    def once(self, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all tokens once, in the order of the file: for evaluation.

        Every token but the first of the file is a target exactly once over all ranks, those that fill no window
        included. Every rank gives the same number of batches, filled up with targets of -100, so that none waits
        for another.

        Yields:
            token ids and targets, (B, T) each, int64, on the CPU.

        Raises:
            DataError: if there are fewer than two tokens.
            ConfigurationError: if there is no such rank.
        """
        check_rank(rank, world_size)
        if self.tokens < 2:
            raise DataError(f"{self.folder / self.split}.bin holds a single token: there is nothing to predict.")
        return self.passed_once(rank, world_size)

    def passed_once(self, rank: int, world_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See :meth:`once`."""
        size, length = self.microbatch_size, self.block_size
        windows = -(-(self.tokens - 1) // length)
        in_order = self.in_order()
        for number in range(-(-windows // (size * world_size))):
            ids = torch.zeros(size, length, dtype=torch.int64)
            targets = torch.full((size, length), IGNORE)
            first = (number * world_size + rank) * size
            for row, window in enumerate(range(first, min(first + size, windows))):
                part = self.within_vocabulary(in_order[window * length : window * length + length + 1])
                ids[row, : len(part) - 1] = part[:-1]
                targets[row, : len(part) - 1] = part[1:]
                if self.mask is not None:
                    kept = np.array(self.mask[window * length + 1 : window * length + len(part)])
                    targets[row, : len(part) - 1].masked_fill_(~torch.from_numpy(kept), IGNORE)
            yield ids, targets

    def in_order(self) -> npt.NDArray[Any]:
        """Return the tokens for reading one after the other, where reading ahead is right.

        Raises:
            DataError: if the file has another length than when this was made, perhaps hours ago.
        """
        path = self.folder / f"{self.split}.bin"
        if (size := path.stat().st_size) != self.tokens * self.dtype.itemsize:
            raise DataError(
                f"{path} was changed while it was in use: it has {size:,} bytes now, and had "
                f"{self.tokens * self.dtype.itemsize:,}. Prepare data in a folder that no run reads, and resume."
            )
        return np.memmap(path, self.dtype, mode="r")

    def verify(self) -> None:
        """Read the whole token file and compare its checksum.

        Raises:
            DataError: if a single bit differs from what was written.
        """
        for kind, stated in (("bin", self.sidecar.checksum), ("mask", self.sidecar.mask_checksum)):
            path = self.folder / f"{self.split}.{kind}"
            if stated is None:
                continue
            with open(path, "rb") as file:
                if self.sidecar.hash_of(iter(functools.partial(file.read, 1 << 20), b"")) != stated:
                    raise DataError(
                        f"{path} is damaged: its checksum differs from that in {self.split}.json; prepare again."
                    )


def mapped(path: Path, dtype: "np.dtype[Any]") -> npt.NDArray[Any]:
    """Return the content of a file as an array that is mapped, not read."""
    with open(path, "rb") as file:
        found = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):  # not on Windows
        # Else the system reads far around each window, most of it in vain: reading 24,000 cold windows of 2 KB
        # from 1 GB took 1 GB instead of 140 MB, and the first batch 40 ms and more instead of 2 to 13.
        found.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(found, dtype)


def shuffled(
    positions: npt.NDArray[np.int64], count: int, seed: int, epoch: int, rounds: int = ROUNDS
) -> npt.NDArray[np.int64]:
    """Return what stands at these positions of a random order of 0 ... count - 1, without computing the rest of it.

    The swap-or-not shuffle (Hoang, Morris and Rogaway 2012, https://arxiv.org/abs/1208.1176): in each round every
    element is paired with its mirror image about a random pivot, and a hash of the pair decides whether they change
    places. A bijection for every count that needs no memory; a table of the order would take 8 bytes a sequence,
    and seconds at the start of each epoch.

    Args:
        positions: (n,) int64 in [0, count).
        count: length of the order.
        seed: any integer.
        epoch: another order for each.
        rounds: of the shuffle.

    Returns:
        (n,) int64 in [0, count).
    """
    drawn = hashlib.shake_256(f"order {seed} {epoch}".encode()).digest(16 * rounds)
    keys = np.frombuffer(drawn, "<u8").reshape(rounds, 2)
    places = positions.astype(np.int64)
    for pivot, key in zip((keys[:, 0] % np.uint64(count)).astype(np.int64), keys[:, 1], strict=True):
        mirrored = pivot - places
        mirrored += count * (mirrored < 0)
        coin = np.maximum(places, mirrored).astype(np.uint64) ^ key  # the same for both of a pair
        coin *= np.uint64(0x9E3779B97F4A7C15)  # multiply, fold, multiply: the top bit depends on every bit
        coin ^= coin >> np.uint64(32)
        coin *= np.uint64(0xBF58476D1CE4E5B9)
        places = np.where(coin >> np.uint64(63) == 1, mirrored, places)
    return places


def check_rank(rank: int, world_size: int) -> None:
    """Raise ConfigurationError if there is no such rank."""
    if not 0 <= rank < world_size:
        raise ConfigurationError(f"rank is {rank} and world_size {world_size}: ranks are counted from 0.")
