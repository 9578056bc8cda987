"""Text files that grow while a run reads them: appended to, or joined by later ones.

The stream is the text of all files, in the order of their names, with the end of a document behind each. Only the last
file may still grow, and of it complete lines are read only. Each line is encoded by itself, so what the run sees does
not depend on when the text came. A run reads everything once, from the beginning, and never again.
"""

import codecs
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reference.data.documents import files_below
from reference.data.tokenizer import FILE, load_tokenizer
from reference.errors import ConfigurationError, DataError

logger = logging.getLogger("reference")

Ids = npt.NDArray[np.int64]
POLL = 0.5  # seconds between two looks for more text
TELL = 30.0  # seconds between two messages that the run waits
SLICE = 1 << 20  # bytes of a file read at a time


class TextStream:
    """Batches from a folder of text that grows. It needs one process: see :meth:`batches_from`.

    Args:
        folder: with the text files; all below it count that are not hidden.
        data: a folder that ``prepare`` wrote, whose tokenizer encodes the text.
        block_size: T, targets per sequence.
        microbatch_size: B, sequences per microbatch.

    Raises:
        DataError: if one of the folders is not there.
        ConfigurationError: if there is no tokenizer.
    """

    def __init__(self, folder: str | Path, data: str | Path, *, block_size: int, microbatch_size: int) -> None:
        self.folder, self.block_size, self.microbatch_size = Path(folder), block_size, microbatch_size
        if not self.folder.is_dir():
            raise DataError(f"there is no folder {folder} with text that grows: make it, or correct data.stream.")
        if not Path(data).is_dir():
            raise DataError(f"there is no data in {data}: write it with `python -m reference prepare --out {data}`.")
        self.encoder = load_tokenizer(data)
        self.tokenizer, self.vocab_size = self.encoder.name, self.encoder.vocab_size
        self.end_of_document = self.encoder.end_of_document
        self.tokenizer_file = Path(data) / FILE if self.tokenizer == FILE else None
        self.ended: Callable[[], bool] = lambda: False
        """While it waits for text, the stream asks this; if True, its batches end. The trainer sets it."""

    def describe(self) -> str:
        """Return one line: what is used."""
        size = sum(path.stat().st_size for path in files_below(self.folder))
        return f"train: text that grows in {self.folder}, {size:,} bytes until now ({self.tokenizer})"

    def batches_from(self, start: int, rank: int = 0, world_size: int = 1) -> Iterator[Tensor]:
        """Yield token ids (B, T + 1), int64, beginning with microbatch ``start``, and wait where text is missing.

        Microbatch m holds the sequences m * B to m * B + B - 1; each begins with the last token of the one before.

        Raises:
            ConfigurationError: if there are several processes: one might find text where another waits.
            DataError: while they are read: if a file is not UTF-8, shrinks, or comes too late for its name.
        """
        if world_size > 1:
            raise ConfigurationError(
                f"data.stream is read by one process, but there are {world_size}: set devices to 1, or use prepare."
            )
        return self.microbatches(start)

    def once(self, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Refuse: a stream has no end. Evaluate on token files."""
        raise ConfigurationError("text that grows cannot be evaluated: give the validation split of token files.")

    def microbatches(self, start: int) -> Iterator[Tensor]:
        """See :meth:`batches_from`."""
        size, length = self.microbatch_size, self.block_size
        skip = start * size * length
        held: list[Ids] = []
        count = 0
        for ids in self.pieces():
            if skip >= len(ids):
                skip -= len(ids)
                continue
            held.append(ids[skip:])
            count += len(ids) - skip
            skip = 0
            if count <= size * length:
                continue
            tokens = np.concatenate(held)
            while len(tokens) > size * length:
                rows = [tokens[n * length : n * length + length + 1] for n in range(size)]
                yield torch.from_numpy(np.stack(rows))
                tokens = tokens[size * length :]
            held, count = [tokens], len(tokens)

    def pieces(self) -> Iterator[Ids]:
        """Yield ids of lines and ends of documents; where no more is there, wait for it, until ``ended()``."""
        read: dict[Path, int] = {}
        waited = 0.0
        while True:
            files, found = files_below(self.folder), False
            late = [path for path in files if path not in read and read and path < max(read)]
            gone = [path for path in read if path not in files]
            if late or gone:
                what = f"{late[0]} has come after {max(read)} was read" if late else f"{gone[0]} is gone"
                raise DataError(f"{what}: text that grows must be appended, or come in files with later names.")
            for number, path in enumerate(files):
                last = number + 1 == len(files)
                if not last and read.get(path) == -1:
                    continue
                for ids in self.more_of(path, read, last):
                    found = True
                    yield ids
            if found:
                waited = 0.0
                continue
            if self.ended():
                return
            if waited % TELL < POLL:
                logger.info("data: waiting for more text in %s", self.folder)
            time.sleep(POLL)
            waited += POLL

    def more_of(self, path: Path, read: dict[Path, int], last: bool) -> Iterator[Ids]:
        """Yield the ids of what a file has more than before, and note in ``read`` how far; -1: to its end."""
        place = max(read.setdefault(path, 0), 0)
        try:
            with path.open("rb") as file:
                if file.seek(0, 2) < place:
                    raise DataError(f"{path} became shorter while it was read: text that grows must be appended.")
                file.seek(place)
                rest = b""
                while chunk := file.read(SLICE):
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        yield self.encoded(line + b"\n", path, place == 0)
                        place += len(line) + 1
                        read[path] = place
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
        if not last:
            if rest:
                yield self.encoded(rest, path, place == 0)
            read[path] = -1
            yield np.array([self.end_of_document], np.int64)

    def encoded(self, line: bytes, path: Path, first: bool) -> Ids:
        """Return the ids of a line."""
        try:
            text = line.removeprefix(codecs.BOM_UTF8 if first else b"").decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text: convert it first.") from error
        return np.array(self.encoder.encode(text), np.int64)
