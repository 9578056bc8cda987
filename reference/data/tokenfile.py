"""Token files on the disk: written completely or not at all, checked when they are opened.

A data folder holds, for each split (``train``, ``validation``),

    SPLIT.bin     the token ids and nothing else, little-endian, 16 bits wide where the vocabulary fits, else 32
    SPLIT.json    what they are: dtype, count, documents, vocabulary, end of document, tokenizer, checksums

and ``tokenizer.json`` if the tokenizer is not plain bytes. A document ends with the id ``end_of_document``, which
stands nowhere else, so the file itself keeps the boundaries.
"""

import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

FORMAT = "reference tokens 1"
SLICE = 1 << 20  # tokens or bytes handled at a time, so that no document and no file has to fit into memory
SAMPLED_BLOCKS, BLOCK = 64, 4096  # what opening reads of a file: 64 blocks of 4 KiB, evenly spaced, first and last too
ABANDONED = 86400  # seconds without a write after which a partial file belongs to a process that was killed

Ids = Sequence[int] | npt.NDArray[np.integer[Any]]


class DataError(ValueError):
    """Token files or texts that cannot be used. The message says which, what is wrong and what to do."""


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """What SPLIT.json says about SPLIT.bin."""

    format: str
    """Name and version of this format."""
    dtype: str
    """``uint16`` or ``uint32``, little-endian."""
    tokens: int
    """Token ids in the file."""
    documents: int
    """Ends of documents in it: how often end_of_document stands there."""
    vocab_size: int
    """Every id is below it."""
    end_of_document: int
    """The id behind each document."""
    tokenizer: str
    """``bytes``, or ``tokenizer.json`` for the file of that name in the same folder."""
    tokenizer_checksum: str | None
    """BLAKE2b of tokenizer.json, None where there is none."""
    checksum: str
    """BLAKE2b of the whole token file: :meth:`TokenData.verify` compares it."""
    sampled_checksum: str
    """BLAKE2b of 64 blocks of 4 KiB, evenly spaced (all of a file up to 256 KiB): compared at every opening."""

    @property
    def size(self) -> int:
        """Bytes that the token file must have."""
        return self.tokens * np.dtype(self.dtype).itemsize

    def text(self) -> str:
        """The file's content: the fields, and a checksum over them against editing and damage."""
        plain = asdict(self)
        return json.dumps(plain | {"sidecar_checksum": hash_of([json.dumps(plain).encode()])}, indent=2) + "\n"


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

    def __init__(self, folder: Path, split: str, *, vocab_size: int, tokenizer: str, end_of_document: int) -> None:
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
        self.checksum = hashlib.blake2b(digest_size=16)
        self.partial: Path | None = None

    def __enter__(self) -> Self:
        with self.told():
            self.folder.mkdir(parents=True, exist_ok=True)
            self.partial = temporary(self.folder, f"{self.split}.bin")
            self.file: BinaryIO = open(self.partial, "wb", buffering=SLICE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # a full disk: closing flushes again, and the cause is already told
            self.file.close()
        if self.partial is not None:
            self.partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Turn what the system refuses into one sentence."""
        try:
            yield
        except OSError as error:
            raise DataError(
                f"the {self.split} tokens could not be written to {self.folder} ({error.strerror or error}): make "
                "room or choose another folder; nothing was published."
            ) from error

    def write(self, ids: Ids) -> None:
        """Append ids of the current document: integers in [0, vocab_size), one dimension, no end_of_document."""
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
            self.append(part)

    def end_document(self) -> None:
        """Append the end of a document. Only at a true end: never where a document was merely cut."""
        self.append(np.array([self.end]))
        self.documents += 1

    def append(self, ids: npt.NDArray[Any]) -> None:
        """Append checked ids."""
        stored = np.ascontiguousarray(ids, self.dtype)
        with self.told():
            self.file.write(stored.data)
        self.checksum.update(stored.data)
        self.tokens += stored.size

    def finish(self) -> Sidecar:
        """Flush all to the disk, and describe it."""
        if not self.tokens:
            raise DataError(f"there is no token for the {self.split} split: give at least one document.")
        assert self.partial is not None
        with self.told():
            self.file.flush()
            os.fsync(self.file.fileno())
            sampled = sampled_checksum(self.partial)
            path = self.folder / "tokenizer.json"
            known = self.tokenizer == path.name and path.is_file()
            return Sidecar(
                format=FORMAT,
                dtype=self.dtype.name,
                tokens=self.tokens,
                documents=self.documents,
                vocab_size=self.vocab_size,
                end_of_document=self.end,
                tokenizer=self.tokenizer,
                tokenizer_checksum=hash_of([path.read_bytes()]) if known else None,
                checksum=self.checksum.hexdigest(),
                sampled_checksum=sampled,
            )

    def publish(self) -> None:
        """Give both files their names. The sidecar comes last: without it the token file does not open."""
        publish([self])


def publish(writers: Sequence[TokenWriter]) -> None:
    """Publish several splits of one folder together: none opens before all are there, and never an old beside a new.

    Raises:
        DataError: if a split is empty, or the disk does not take it.
    """
    sidecars = [(writer, writer.finish()) for writer in writers]
    for writer, sidecar in sidecars:
        target = writer.folder / f"{writer.split}.json"
        with writer.told(), contextlib.suppress(FileNotFoundError):
            if target.read_text(encoding="utf-8", errors="replace") != sidecar.text():
                target.unlink()  # what it describes is about to be replaced
    for writer, _ in sidecars:
        assert writer.partial is not None
        with writer.told():
            writer.file.close()
            writer.partial.replace(writer.folder / f"{writer.split}.bin")
        writer.partial = None
    for writer, sidecar in sidecars:
        with writer.told():
            write_file(writer.folder / f"{writer.split}.json", sidecar.text().encode())
    flush(sidecars[0][0].folder)


def open_sidecar(folder: Path, split: str) -> Sidecar:
    """Read SPLIT.json, and check SPLIT.bin and tokenizer.json against it, as far as that costs no time.

    Raises:
        DataError: if a file is missing, damaged, or does not belong to the others.
    """
    path, tokens = folder / f"{split}.json", folder / f"{split}.bin"
    again = f"write it again with `python -m reference prepare --out {folder}`"
    if not path.is_file():
        if tokens.is_file():
            raise DataError(
                f"{tokens} has no {path.name} beside it (an interrupted writing, or a foreign file): {again}."
            )
        there = ", ".join(sorted(found.stem for found in folder.glob("*.bin"))) or "no token file"
        raise DataError(
            f"{folder} has no {split} split (there is: {there}): "
            f"write one with `python -m reference prepare --out {folder}`."
        )
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        stated = plain.pop("sidecar_checksum")
        known = plain["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no description of a token file ({type(error).__name__}): {again}.") from error
    if not known:
        raise DataError(f"{path} has the format {plain['format']!r}, but this version reads {FORMAT!r}: {again}.")
    if stated != hash_of([json.dumps(plain).encode()]) or set(plain) != {entry.name for entry in fields(Sidecar)}:
        raise DataError(f"{path} was changed since it was written, or is damaged: {again}.")
    sidecar = Sidecar(**plain)
    try:
        size = tokens.stat().st_size
        if size != sidecar.size:
            raise DataError(
                f"{tokens} has {size:,} bytes, but {path.name} says {sidecar.size:,} ({sidecar.tokens:,} tokens, "
                f"{sidecar.dtype}): it is truncated or foreign; copy it again, or {again}."
            )
        if sampled_checksum(tokens) != sidecar.sampled_checksum:
            raise DataError(f"{tokens} is not the file that {path.name} describes (its content differs): {again}.")
        if sidecar.tokenizer_checksum is not None:
            tokenizer = folder / sidecar.tokenizer
            if hash_of([tokenizer.read_bytes()]) != sidecar.tokenizer_checksum:
                raise DataError(f"{tokenizer} is not the tokenizer that {tokens.name} was written with: {again}.")
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}), but {path} needs it: {again}.") from error
    return sidecar


def sampled_checksum(path: Path) -> str:
    """BLAKE2b of 64 evenly spaced blocks of 4 KiB, the first and the last included; of all of a small file."""
    with open(path, "rb") as file:
        last = file.seek(0, os.SEEK_END) - BLOCK
        if last <= SAMPLED_BLOCKS * BLOCK - BLOCK:
            file.seek(0)
            return hash_of([file.read()])
        starts = (last * number // (SAMPLED_BLOCKS - 1) for number in range(SAMPLED_BLOCKS))
        return hash_of(file.read(BLOCK) for start in starts if file.seek(start) >= 0)


def hash_of(parts: Iterable[bytes]) -> str:
    """BLAKE2b of content that comes in parts, 128 bits in hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def temporary(folder: Path, name: str) -> Path:
    """A new hidden file beside ``name``, on the same disk, which no other process writes to."""
    for left in folder.glob(f".{name}.*.partial"):
        with contextlib.suppress(OSError):  # another process removed it
            if left.stat().st_mtime < time.time() - ABANDONED:
                left.unlink()
    # Not by tempfile: its files can only be read by their owner, but data is shared as the system's umask says.
    path = folder / f".{name}.{secrets.token_hex(8)}.partial"
    path.touch(exist_ok=False)
    return path


def write_file(path: Path, content: bytes) -> None:
    """Write a small file: under another name, flushed to the disk, then renamed."""
    partial = temporary(path.parent, path.name)
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def flush(folder: Path) -> None:
    """Force a folder's entries onto the disk, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
