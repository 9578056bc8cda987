"""Token files on the disk: written completely or not at all, checked when they are opened.

A data folder holds, for each split (``train``, ``validation``),

    SPLIT.bin     the token ids and nothing else, little-endian, 16 bits wide where the vocabulary fits, else 32
    SPLIT.json    what they are: dtype, count, documents, vocabulary, end of document, tokenizer, checksums
    SPLIT.mask    only of chats: for each id a byte, 1 if it is a target and 0 if the loss leaves it out

``tokenizer.json`` if the tokenizer is not plain bytes, and SHA256SUMS, which has a checksum of each file. A document
ends with the id ``end_of_document``, which stands nowhere else, so the file itself keeps the boundaries.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from reference.data.sidecar import (
    FORMAT,
    MASKED_FORMAT,
    SLICE,
    Sidecar,
    hash_of,
    sampled_checksum,
)
from reference.errors import DataError
from reference.files import SUMS, flush, format_sums, partial_file, read_sums

Ids = Sequence[int] | npt.NDArray[np.integer[Any]]


def write_tokens(
    folder: Path, split: str, documents: Iterable[Ids], *, vocab_size: int, tokenizer: str, end_of_document: int
) -> Path:
    """Write one split: the documents' ids, each document followed by ``end_of_document``.

    Both files appear complete or not at all; files of an earlier writing are replaced. Documents are consumed one by
    one and written in slices: neither the split nor a memory-mapped document has to fit into memory.

    Args:
        folder: made if it is not there.
        split: ``train`` or ``validation``, or another name.
        documents: token ids of each, without an end: integers, one dimension.
        vocab_size: ids must be below it; up to 65536 they are stored in 16 bits.
        tokenizer: ``bytes``, or ``tokenizer.json`` for a file that is in the folder already; any other name says
            where the ids come from, and offers no way back to text.
        end_of_document: id that is appended to each document and must not stand within one.

    Returns:
        The path of the token file.

    Raises:
        DataError: if an id does not fit, there is no document, or the disk does not take it.
    """
    with TokenWriter(
        folder, split, vocab_size=vocab_size, tokenizer=tokenizer, end_of_document=end_of_document
    ) as writer:
        for document in documents:
            writer.write(document)
            writer.end_document()
        writer.publish()
    return folder / f"{split}.bin"


class TokenWriter:
    """Writes one split piece by piece, for documents that come in pieces. :func:`write_tokens` is the short form.

    A context manager. Nothing can be seen in the folder before :meth:`publish`, and nothing is left of what was
    not published.

    Raises:
        DataError: as :func:`write_tokens`.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        vocab_size: int,
        tokenizer: str,
        end_of_document: int,
        masked: bool = False,
    ) -> None:
        """See :func:`write_tokens`; ``masked``: also write which ids are targets."""
        if not 0 <= end_of_document < vocab_size <= 1 << 32:
            raise DataError(
                f"vocab_size is {vocab_size} and end_of_document {end_of_document}: the end of a document is an id "
                "below vocab_size, which is at most 2**32."
            )
        self.folder = folder
        self.split = split
        self.vocab_size = vocab_size
        self.tokenizer = tokenizer
        self.end = end_of_document
        # An id that does not fit would wrap around in silence (datatrove#118); write() refuses it before.
        self.dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self.tokens = 0
        self.documents = 0
        self.checksum = hashlib.sha256()
        self.partial: Path | None = None
        self.masked = masked
        self.targets = 0
        self.mask_checksum = hashlib.sha256()
        self.mask_partial: Path | None = None

    def __enter__(self) -> Self:
        with self.told():
            self.folder.mkdir(parents=True, exist_ok=True)
            self.partial = partial_file(self.folder / f"{self.split}.bin")
            self.file: BinaryIO = open(self.partial, "wb", buffering=SLICE)
            if self.masked:
                self.mask_partial = partial_file(self.folder / f"{self.split}.mask")
                self.mask_file: BinaryIO = open(self.mask_partial, "wb", buffering=SLICE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # a full disk: closing flushes again, and the cause is already told
            self.file.close()
            if self.masked:
                self.mask_file.close()
        for partial in (self.partial, self.mask_partial):
            if partial is not None:
                partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Turn what the system refuses into DataError, one sentence."""
        try:
            yield
        except OSError as error:
            raise DataError(
                f"the {self.split} tokens could not be written to {self.folder} ({error.strerror or error}): make "
                "room or choose another folder, and run again."
            ) from error

    def write(self, ids: Ids, targets: npt.NDArray[np.bool_] | None = None) -> None:
        """Append ids of the current document: integers in [0, vocab_size), one dimension, no end_of_document.

        Args:
            ids: to append.
            targets: of a masked split, which of them are targets; None: all.
        """
        array = np.asanyarray(ids)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise DataError(
                f"document {self.documents} of {self.split} is {array.dtype} with shape {array.shape}: token ids are "
                "integers in one dimension."
            )
        for start in range(0, array.size, SLICE):
            part = array[start : start + SLICE]
            low, high = int(part.min()), int(part.max())
            if low < 0 or high >= self.vocab_size:
                raise DataError(
                    f"document {self.documents} of {self.split} has the token id {high if low >= 0 else low}, but "
                    f"vocab_size is {self.vocab_size}: ids lie between 0 and {self.vocab_size - 1}."
                )
            if (part == self.end).any():
                raise DataError(
                    f"document {self.documents} of {self.split} has end_of_document ({self.end}) inside: leave it "
                    "out, it is appended to each document."
                )
            self.append(part, None if targets is None else targets[start : start + SLICE])

    def end_document(self, target: bool = True) -> None:
        """Append the end of a document. Only at a true end: never where a document was merely cut."""
        self.append(np.array([self.end]), np.array([target]))
        self.documents += 1

    def append(self, ids: npt.NDArray[Any], targets: npt.NDArray[np.bool_] | None) -> None:
        """Append checked ids."""
        stored = np.ascontiguousarray(ids, self.dtype)
        with self.told():
            self.file.write(stored.data)
        self.checksum.update(stored.data)
        self.tokens += stored.size
        if self.masked:
            mask = np.ascontiguousarray(np.ones(stored.size) if targets is None else targets, np.uint8)
            assert mask.size == stored.size, "there is one flag for each id"
            with self.told():
                self.mask_file.write(mask.data)
            self.mask_checksum.update(mask.data)
            self.targets += int(mask.sum())

    def finish(self) -> Sidecar:
        """Flush all to the disk, and return a description of it."""
        if not self.tokens:
            raise DataError(f"there is no token for the {self.split} split: give at least one document.")
        assert self.partial is not None
        with self.told():
            self.file.flush()
            os.fsync(self.file.fileno())
            sampled = sampled_checksum(self.partial, FORMAT)
            mask: dict[str, Any] = {}
            if self.mask_partial is not None:
                self.mask_file.flush()
                os.fsync(self.mask_file.fileno())
                mask = {"targets": self.targets, "mask_checksum": self.mask_checksum.hexdigest()}
                mask["mask_sampled_checksum"] = sampled_checksum(self.mask_partial, MASKED_FORMAT)
            path = self.folder / "tokenizer.json"
            known = self.tokenizer == path.name and path.is_file()
            return Sidecar(
                format=MASKED_FORMAT if mask else FORMAT,
                dtype=self.dtype.name,
                tokens=self.tokens,
                documents=self.documents,
                vocab_size=self.vocab_size,
                end_of_document=self.end,
                tokenizer=self.tokenizer,
                tokenizer_checksum=hash_of([path.read_bytes()], FORMAT) if known else None,
                checksum=self.checksum.hexdigest(),
                sampled_checksum=sampled,
                **mask,
            )

    def publish(self) -> None:
        """Give both files their names. The sidecar comes last: without it the token file does not open."""
        publish([self])


def publish(writers: Sequence[TokenWriter]) -> None:
    """Publish several splits of one folder together: none opens before all are there, and never an old beside a new.

    Raises:
        DataError: if a split is empty, or the disk does not take it; a full one has changed nothing then.
    """
    folder = writers[0].folder
    described = {writer.split: writer.finish() for writer in writers}
    contents = {f"{split}.json": sidecar.content() for split, sidecar in described.items()}
    sums = {f"{split}.bin": sidecar.checksum for split, sidecar in described.items()}
    sums |= {name: hash_of([content], FORMAT) for name, content in contents.items()}
    sums |= {f"{split}.mask": s.mask_checksum for split, s in described.items() if s.mask_checksum is not None}
    sums |= {s.tokenizer: s.tokenizer_checksum for s in described.values() if s.tokenizer_checksum is not None}
    gone = {f"{split}.mask" for split in described} - sums.keys()  # of an earlier writing
    kept = {name: value for name, value in (read_sums(folder) or {}).items() if name not in gone}
    small = {SUMS: format_sums(kept | sums)} | contents
    with writers[0].told(), staged(folder, small) as partials:  # first what takes room: what follows takes none
        for name, content in contents.items():
            with contextlib.suppress(FileNotFoundError):
                if (folder / name).read_bytes() != content:
                    (folder / name).unlink()  # what it describes is about to be replaced
        for writer in writers:
            assert writer.partial is not None
            writer.file.close()
            writer.partial.replace(folder / f"{writer.split}.bin")
            writer.partial = None
            if writer.mask_partial is not None:
                writer.mask_file.close()
                writer.mask_partial.replace(folder / f"{writer.split}.mask")
                writer.mask_partial = None
            else:
                (folder / f"{writer.split}.mask").unlink(missing_ok=True)
        for name, partial in partials.items():
            partial.replace(folder / name)
        flush(folder)


@contextlib.contextmanager
def staged(folder: Path, contents: Mapping[str, bytes]) -> Iterator[dict[str, Path]]:
    """Yield files with these contents under hidden names, on the disk; those that are not renamed are removed."""
    partials: dict[str, Path] = {}
    try:
        for name, content in contents.items():
            partials[name] = partial_file(folder / name)
            partials[name].write_bytes(content)
            flush(partials[name])
        yield partials
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
