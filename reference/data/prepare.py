"""From text files to token files: find and divide them, train or load the tokenizer, encode, publish."""

import contextlib
import logging
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, cast

from reference.data.chat import ChatTemplate
from reference.data.documents import SPLITS, Document, divide, examine, find_files, standard_library, total_size
from reference.data.encode import bars, read_all, told_if_full, write, write_chats
from reference.data.readback import Readback
from reference.data.records import SUFFIXES, examine_records
from reference.data.sidecar import open_sidecar
from reference.data.tokenfile import TokenWriter, publish
from reference.data.tokenizer import (
    FILE,
    TEMPLATE,
    ByteTokenizer,
    FileTokenizer,
    Tokenizer,
    check_size,
    load_tokenizer,
    stated_tokenizer,
    train_tokenizer,
)
from reference.errors import ConfigurationError
from reference.files import SUMS, write_file

if TYPE_CHECKING:
    pass

logger = logging.getLogger("reference")

RECORDS = {*SUFFIXES, ".json"}


@dataclass(frozen=True)
class Prepared:
    """What :func:`prepare` has written."""

    folder: Path
    tokenizer: str
    """``bytes`` or ``tokenizer.json``."""
    vocab_size: int
    files: int
    """Text files, or records, used."""
    size: int
    """Their bytes."""
    tokens: dict[str, int]
    """By split, ends of documents included."""
    documents: dict[str, int]
    """Ends of documents by split."""
    divided: str
    """How the splits were told apart: ``by file`` or ``by position``."""
    skipped: tuple[tuple[Path, str], ...]
    """Files that were left out, each with the reason."""
    readback: dict[str, Readback]
    """What came back when a sample of each split was decoded again."""
    what: Literal["text file", "record", "conversation"] = "text file"
    """What each document comes from."""
    targets: dict[str, int] | None = None
    """Of chats: tokens of the assistant's turns by split, which alone are targets."""

    def describe(self) -> str:
        """Return some lines: what was written, and what was left out."""
        lines = [
            f"{self.folder}: {self.files:,} {self.what}{'s' * (self.files != 1)}, {self.size:,} bytes, "
            f"split {self.divided}; {self.tokenizer}, vocabulary {self.vocab_size:,}"
        ]
        lines += [
            f"{split}: {self.tokens[split]:,} tokens, {self.documents[split]:,} ends of documents; "
            f"decoded again: {self.readback[split].describe()}"
            for split in SPLITS
        ]
        if self.targets is not None:
            told = ", ".join(f"{self.targets[split]:,} of {split}" for split in SPLITS)
            lines.append(f"targets: only the tokens of the assistant's turns, {told}")
        reasons = Counter(reason for _, reason in self.skipped)
        for reason, number in reasons.most_common():
            example = next(path for path, why in self.skipped if why == reason)
            lines.append(
                f"left out: {number:,} {self.what.split()[-1]}{'s' * (number != 1)} ({reason}), e.g. {example}"
            )
        files = [f"{split}.{kind}" for split in SPLITS for kind in ("bin", "json")]
        files += [f"{split}.mask" for split in SPLITS if self.targets is not None]
        files += [SUMS, *([FILE] if self.tokenizer == FILE else []), *([TEMPLATE] if self.targets is not None else [])]
        return "\n".join([*lines, f"Written: {self.folder / files[0]}, and beside it {', '.join(files[1:])}"])


def prepare(
    text: Sequence[str],
    tokenizer: str,
    out: Path,
    *,
    validation_share: float = 0.05,
    seed: int = 1337,
    end_of_document: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
    field: str | None = None,
) -> Prepared:
    """Write the token files of both splits, and tokenizer.json, from text files or from records.

    Files that are not UTF-8, hold NUL bytes, are empty, hidden or copies of others are left out, and the result says
    so. The split is by file. Where that cannot come near the share asked for (few files, or one that outweighs the
    rest), it is by position in the whole text: the end of it is for validation, and one document may be cut. A byte
    order mark is dropped. Text that reads like the end of a document is kept as the characters that it consists of. A
    sample of what is written is decoded again, and what was lost is told.

    Args:
        text: files, folders (all files below that are not hidden) and glob patterns. None given: the sources of
            Python's standard library, without its tests.
        tokenizer: ``bytes``; ``bpe:SIZE``, trained on the training split; or the path of a tokenizer.json.
        out: data folder. Made if it is not there; nothing in it changes before all is written.
        validation_share: part of the text that is kept for validation.
        seed: chooses which.
        end_of_document: the token of a tokenizer.json that ends a document. None: one of the usual names.
        overwrite: also replace data of another tokenizer.
        progress: show on standard error how far it is: bars on a terminal, elsewhere a line every few seconds.
        field: the files hold records (JSON lines, CSV, Parquet), and this field of each is a document: its text, or a
            list of chat messages, which the chat template beside the tokenizer.json renders. Of chats, only the tokens
            of the assistant's turns are targets.

    Raises:
        ConfigurationError: for settings that cannot work.
        DataError: if there is no text, or the disk does not take the files.
    """
    if not 0.0 < validation_share < 1.0:
        raise ConfigurationError(f"validation_share is {validation_share}, but must be more than 0 and less than 1.")
    if out.exists() and not out.is_dir():
        raise ConfigurationError(f"{out} is a file: give a folder to write the token files to.")
    trained = tokenizer.startswith("bpe:") and end_of_document is None  # load_tokenizer refuses both together
    given = None if trained else load_tokenizer(tokenizer, end_of_document)
    size = 0 if given is not None else bpe_size(tokenizer)
    if given is not None:
        check_folder(out, given, overwrite)  # before the work rather than after it
    if field is not None and not text:
        raise ConfigurationError("field names a part of records: give the files of records, too.")
    paths = find_files(text, out) if text else standard_library()
    chats: ChatTemplate | None = None
    with bars(progress) as shown, contextlib.ExitStack() as held:
        if field is None:
            documents, skipped = examine(paths, seed, shown)
            warn_of_records(documents)
        else:
            spool = held.enter_context(tempfile.NamedTemporaryFile(prefix="reference-records-"))
            with told_if_full(spool.name):
                documents, skipped, chats = examine_records(
                    list(shown.track(paths, description="reading")),
                    field,
                    seed,
                    cast("BinaryIO", spool),
                    lambda: ChatTemplate(given, tokenizer),
                )
        train, validation, divided = divide(documents, validation_share, whole=chats is not None)
        chosen = given if given is not None else train_tokenizer(read_all(train, shown), size)
        if chosen.vocab_size < size:
            logger.info("tokenizer: the text has enough pairs for %d ids only, not for %d", chosen.vocab_size, size)
        check_folder(out, chosen, overwrite)
        with contextlib.ExitStack() as stack:
            writers, read_back = [], {}
            for split, part in zip(SPLITS, (train, validation), strict=True):
                writer = TokenWriter(
                    out,
                    split,
                    vocab_size=chosen.vocab_size,
                    tokenizer=chosen.name,
                    end_of_document=chosen.end_of_document,
                    masked=chats is not None,
                )
                writers.append(stack.enter_context(writer))
                read_back[split] = Readback(chosen)
                if chats is not None:
                    write_chats(writer, part, chats, shown, read_back[split])
                else:
                    write(writer, part, chosen, shown, read_back[split])
            if isinstance(chosen, FileTokenizer):
                with writers[0].told():
                    write_file(out / FILE, chosen.content)
                    if chats is not None:  # for the checkpoints of runs on these chats, and their exports
                        write_file(out / TEMPLATE, chats.text.encode(errors="replace"))
            publish(writers[::-1])  # the training split last: where it opens, all is there
    for split, found in read_back.items():
        found.warn(split)
    return Prepared(
        folder=out,
        tokenizer=chosen.name,
        vocab_size=chosen.vocab_size,
        files=len(documents),
        what="text file" if field is None else "record" if chats is None else "conversation",
        targets={writer.split: writer.targets for writer in writers} if chats is not None else None,
        size=total_size(documents),
        tokens={writer.split: writer.tokens for writer in writers},
        documents={writer.split: writer.documents for writer in writers},
        divided=divided,
        skipped=tuple(skipped),
        readback=read_back,
    )


def warn_of_records(documents: Sequence[Document]) -> None:
    """Say so if files look as if each held many documents, among what is not text."""
    found = [document.path for document in documents if document.path.suffix.lower() in RECORDS]
    if found:
        logger.warning(
            "%d of %d files hold records rather than text (%s): each file becomes one document, with its keys and "
            "quotes. If each record should be a document, name the field that holds its text with --field.",
            *(len(found), len(documents), found[0]),
        )


def prepare_default(out: Path, *, progress: bool = True) -> Prepared | None:
    """Python's standard library as bytes, unless the folder holds data already (then None, and it is not touched).

    Several processes may call this at once: each writes the same, and the files appear whole.

    Raises:
        DataError: if the folder holds data that does not open, or the disk does not take it.
    """
    if (out / "train.json").exists():  # which is published last
        for split in SPLITS:
            open_sidecar(out, split)
        return None
    return prepare([], ByteTokenizer.name, out, progress=progress)


def bpe_size(spec: str) -> int:
    """Return the size in ``bpe:SIZE``.

    Raises:
        ConfigurationError: if there is none, or too small a one.
    """
    size = spec.removeprefix("bpe:")
    if not (size.isascii() and size.isdecimal() and len(size) < 10):
        raise ConfigurationError(f"tokenizer {spec!r} has no size: write bpe:SIZE, for example bpe:4096.")
    check_size(int(size))
    return int(size)


def check_folder(out: Path, tokenizer: Tokenizer, overwrite: bool) -> None:
    """Raise ConfigurationError if ``out`` holds data or a tokenizer.json of another tokenizer, unless told."""
    if overwrite:
        return
    stated = stated_tokenizer(out)
    file = out / FILE
    other = stated not in (None, tokenizer.name)
    if isinstance(tokenizer, FileTokenizer) and file.is_file():
        other = other or file.read_bytes() != tokenizer.content
    if other:
        raise ConfigurationError(
            f"{out} holds data of another tokenizer ({stated or FILE}): choose another folder, or set overwrite."
        )
