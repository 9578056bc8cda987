"""Text files as documents: found, examined, and divided into training and validation without overlap.

A file is a document. A hash of its content chooses its split, so neither its name nor the other files decide, and
adding files moves none. Exact copies of a file are left out: no text is in both splits. Near copies are not found.
"""

import codecs
import glob
import hashlib
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from reference.data.tokenizer import FILE, TEMPLATE
from reference.errors import DataError
from reference.files import SUMS

if TYPE_CHECKING:
    from rich.progress import Progress

SPLITS = ("train", "validation")
CHUNK = 1 << 18  # bytes read at a time
TOLERANCE = 3  # the validation split by file may be so many times smaller or larger than asked for


@dataclass(frozen=True)
class Document:
    """A text file, or a part of one."""

    path: Path
    digest: bytes
    """Keyed BLAKE2b of the content: chooses the split and the place in it."""
    start: int
    """First byte."""
    stop: int
    """Byte behind the last."""
    ends: bool = True
    """Whether the file ends here too, and with it the document."""
    origin: Path | None = None
    """What messages name in place of the path: the record that the text is from."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.stop - self.start

    @property
    def named(self) -> Path:
        """What messages call it."""
        return self.origin or self.path


def find_files(text: Sequence[str], out: Path) -> list[Path]:
    """Return all files that these names, folders and patterns stand for, each once.

    Left out are hidden files below a folder, and the data folder's own.

    Raises:
        DataError: if one of them stands for nothing.
    """
    found: dict[Path, None] = {}
    for entry in text:
        pattern = re.sub(r"(\*\*/)+", "**/", entry)  # the same files, without walking each folder many times
        matched = [entry] if entry and Path(entry).exists() else sorted(glob.glob(pattern, recursive=True))
        if not matched:
            raise DataError(f"there is no text at {entry or repr(entry)}: give a file, a folder or a quoted pattern.")
        for path in map(Path, matched):
            found |= dict.fromkeys(files_below(path) if path.is_dir() else [path])
    own = {
        os.path.realpath(out / name)  # unlike resolve(), not an error for a circle of links
        for name in (FILE, TEMPLATE, SUMS, *(f"{split}.{kind}" for split in SPLITS for kind in ("bin", "json", "mask")))
    }
    return [path for path in found if os.path.realpath(path) not in own]


def files_below(folder: Path) -> list[Path]:
    """Return all files below a folder, except hidden ones and those in hidden folders."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def standard_library() -> list[Path]:
    """Return the sources of this Python's standard library: real text on every machine, without its tests.

    Raises:
        DataError: if this Python came without sources.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    others = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    found = [
        path
        for path in files_below(folder)
        if path.suffix == ".py" and not others.intersection(path.relative_to(folder).parts)
    ]
    if not found:
        raise DataError(f"this Python has no sources of its standard library in {folder}: give files with --text.")
    return found


def examine(paths: list[Path], seed: int, shown: "Progress") -> tuple[list[Document], list[tuple[Path, str]]]:
    """Read every file once; return the documents, sorted by digest, and the files left out, with the reason.

    A byte order mark is not text: a file with one is a copy of the same file without.

    Raises:
        DataError: if nothing is left.
    """
    documents: dict[bytes, Document] = {}
    skipped: list[tuple[Path, str]] = []
    task = shown.add_task("reading", total=len(paths))
    for path in shown.track(paths, task_id=task):
        digest = keyed_digest(seed)
        decoder = codecs.getincrementaldecoder("utf-8")()
        size = start = 0
        try:
            if not path.is_file():
                raise ValueError("not a file")
            with open(path, "rb") as file:
                start = len(codecs.BOM_UTF8) * (file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8)
                file.seek(start)
                while chunk := file.read(CHUNK):
                    decoder.decode(chunk)
                    if b"\0" in chunk:
                        raise ValueError("binary: holds NUL bytes")
                    digest.update(chunk)
                    size += len(chunk)
            decoder.decode(b"", True)
        except UnicodeDecodeError:
            skipped.append((path, "not UTF-8"))
        except ValueError as error:
            skipped.append((path, str(error)))
        except OSError as error:
            skipped.append((path, f"cannot be read: {error.strerror}"))
        else:
            key = digest.digest()
            if not size:
                skipped.append((path, "empty"))
            elif key in documents:
                skipped.append((path, "copy of another"))
            else:
                documents[key] = Document(path, key, start, start + size)
    if not documents:
        reasons = Counter(reason for _, reason in skipped).most_common(3)
        told = ", ".join(f"{number} {reason}" for reason, number in reasons) or "there is none"
        raise DataError(f"no text file is left of {len(paths)} ({told}): give UTF-8 text.")
    return [documents[key] for key in sorted(documents)], skipped


def keyed_digest(seed: int) -> "hashlib.blake2b":
    """Return the hash, of nothing yet, that chooses a document's split and place."""
    return hashlib.blake2b(digest_size=16, key=hashlib.blake2b(str(seed).encode(), digest_size=16).digest())


def document_key(content: bytes, seed: int) -> bytes:
    """Return the digest of a document's content."""
    digest = keyed_digest(seed)
    digest.update(content)
    return digest.digest()


def divide(documents: list[Document], share: float, whole: bool = False) -> tuple[list[Document], list[Document], str]:
    """Divide documents: return those for training, those for validation, and how they were told apart.

    Args:
        documents: sorted by digest.
        share: of the text that is for validation.
        whole: cut no document.

    Raises:
        DataError: if there is too little text to have two splits.
    """
    # The last half of the digest chooses; its first half orders, so that both splits are in a random order.
    chosen = [int.from_bytes(document.digest[8:]) < share * 2**64 for document in documents]
    train = [document for document, validates in zip(documents, chosen, strict=True) if not validates]
    validation = [document for document, validates in zip(documents, chosen, strict=True) if validates]
    total = total_size(documents)
    if train and share / TOLERANCE <= total_size(validation) / total <= share * TOLERANCE:
        return train, validation, "by file"
    before = 0
    for index, document in enumerate(documents):
        if before + document.size > total * (1.0 - share):
            cut = place_to_cut(document, document.start + int(total * (1.0 - share)) - before)
            cut = document.start if whole else cut
            head = replace(document, stop=cut, ends=False)
            tail = replace(document, start=cut)
            train = documents[:index] + ([head] if head.size else [])
            if not train:
                break
            return train, [tail, *documents[index + 1 :]], "by position"
        before += document.size
    raise DataError(f"{total} bytes of text are too few for a training and a validation split: give more.")


def place_to_cut(document: Document, wanted: int) -> int:
    """Return a byte at which to cut, at most ``wanted``: after a line end not far before it, or between characters."""
    # A character has up to 4 bytes.
    start = max(document.start, min((document.start + wanted) // 2, wanted - 4), wanted - CHUNK)
    try:
        with open(document.path, "rb") as file:
            file.seek(start)
            before = file.read(wanted - start + 1)
    except OSError as error:
        raise DataError(f"{document.path} can no longer be read ({error.strerror}): run again.") from error
    line = before.rfind(b"\n", 0, len(before) - 1) + 1
    if line:
        return start + line
    cut = len(before) - 1
    while cut > 0 and before[cut] & 0xC0 == 0x80:  # a byte within a character
        cut -= 1
    return start + cut


def total_size(documents: Iterable[Document]) -> int:
    """Return the bytes of all of them."""
    return sum(document.size for document in documents)


def read(document: Document) -> Iterator[str]:
    """Yield the document's text, in chunks. Line ends stay as they are; :func:`examine` left out a byte order mark.

    Raises:
        DataError: if the file has changed since it was examined.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    left = document.size
    try:
        with open(document.path, "rb") as file:
            file.seek(document.start)
            while left and (chunk := file.read(min(CHUNK, left))):
                left -= len(chunk)
                yield decoder.decode(chunk, final=not left)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{document.path} changed while it was read ({error}): run again.") from error
    if left:
        raise DataError(f"{document.path} became shorter while it was read: run again.")
