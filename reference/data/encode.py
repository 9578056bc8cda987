"""Documents to token ids: read in chunks, cut where no token crosses, encoded many at a time, written."""

import contextlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from reference.data.chat import ChatTemplate, Conversation
from reference.data.documents import Document, read, total_size
from reference.data.readback import Readback
from reference.data.tokenfile import TokenWriter
from reference.data.tokenizer import Tokenizer
from reference.errors import ConfigurationError, DataError
from reference.heartbeat import heartbeat

if TYPE_CHECKING:
    from rich.progress import Progress

logger = logging.getLogger("reference")

PIECE = 1 << 18  # characters of one document encoded as one text
BATCH = 1 << 22  # characters encoded together
CONTEXT = 500  # characters on either side by which a cut is judged


def read_all(documents: list[Document], shown: "Progress") -> Iterator[str]:
    """Yield the texts of all of them, in chunks, to train a tokenizer."""
    task = shown.add_task("training the tokenizer", total=total_size(documents))
    done = 0
    for document in documents:
        for chunk in read(document):
            yield chunk
            shown.advance(task, len(chunk))
        done += document.size
        shown.update(task, completed=done)


def pieces(chunks: Iterable[str], tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """Yield a text in pieces whose ids, one after the other, are those of the whole text; the last is marked.

    It is cut where that changes nothing, judged by encoding some characters around the place with and without the
    cut. A tokenizer that permits none (one that begins every text with a space) gets the document whole.
    """
    held: list[str] = []
    size, enough = 0, PIECE
    for chunk in chunks:
        held.append(chunk)
        size += len(chunk)
        if size >= enough:
            text = "".join(held)
            place = harmless_cut(text, tokenizer)
            if place:
                yield text[:place], False
            held, size = [text[place:]], len(text) - place
            enough = PIECE if place else 2 * size  # joined and tried ever more rarely: no quadratic cost
    yield "".join(held), True


def harmless_cut(text: str, tokenizer: Tokenizer) -> int:
    """Return the last place in ``text`` where a cut changes no id, or 0 if each of some 40 places would."""
    places = [len(text) - CONTEXT]
    while len(places) < 40 and (line := text.rfind("\n", CONTEXT, places[-1] - 1)) > 0:
        places += [line + 1, line]
    for place in places:
        before, behind = text[place - CONTEXT : place], text[place : place + CONTEXT]
        if tokenizer.encode(before) + tokenizer.encode(behind) == tokenizer.encode(before + behind):
            return place
    return 0


def write(
    writer: TokenWriter, documents: list[Document], tokenizer: Tokenizer, shown: "Progress", read_back: Readback
) -> None:
    """Encode documents and append them, some at a time: the tokenizers library encodes several in parallel."""
    task = shown.add_task(f"encoding, {writer.split}", total=total_size(documents))
    texts: list[str] = []
    paths: list[Path] = []
    ends: list[bool] = []

    def append() -> None:
        for text, path, ids, end in zip(texts, paths, encoded(tokenizer, texts, paths), ends, strict=True):
            writer.write(ids)
            read_back.count(ids)
            read_back.compare(text, ids, path)
            if end:
                writer.end_document()
        texts.clear()
        paths.clear()
        ends.clear()

    characters = done = 0
    for document in documents:
        for piece, last in pieces(read(document), tokenizer):
            texts.append(piece)
            paths.append(document.named)
            ends.append(last and document.ends)
            characters += len(piece)
            if characters > BATCH:
                append()
                characters = 0
            shown.advance(task, len(piece))
        done += document.size
        shown.update(task, completed=done)
    append()


def write_chats(
    writer: TokenWriter, documents: list[Document], template: ChatTemplate, shown: "Progress", read_back: Readback
) -> None:
    """Encode conversations and append them, with the tokens of the assistant's turns as targets.

    Where the template itself writes the end of a document, as after each turn, a document ends. If it never does, the
    end comes behind the conversation, and is not a target.
    """
    task = shown.add_task(f"encoding, {writer.split}", total=total_size(documents))
    for document in documents:
        conversation = Conversation.loaded("".join(read(document)))
        ids, targets = template.encoded(conversation)
        read_back.count(ids)
        read_back.compare(conversation.said, ids, document.named)
        ends = np.flatnonzero(ids == writer.end)
        start = 0
        for end in ends.tolist():
            writer.write(ids[start:end], targets[start:end])
            writer.end_document(bool(targets[end]))
            start = end + 1
        writer.write(ids[start:], targets[start:])
        if not len(ends):
            writer.end_document(target=False)
        shown.advance(task, document.size)


def encoded(tokenizer: Tokenizer, texts: list[str], paths: list[Path]) -> list[npt.NDArray[Any]]:
    """Return the ids of several texts; raise DataError, with the name of the file, if one has none."""
    try:
        return tokenizer.encode_batch(texts)
    except ConfigurationError:
        for text, path in zip(texts, paths, strict=True):
            try:
                tokenizer.encode(text)
            except ConfigurationError as error:
                raise DataError(f"{path} cannot be encoded: {error}") from error
        raise


@contextlib.contextmanager
def told_if_full(name: str) -> Iterator[None]:
    """Turn what the system refuses while records are copied into DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"the text of the records could not be copied to {name} ({error.strerror or error}): make room, or set "
            "TMPDIR to a folder with more."
        ) from error


@contextlib.contextmanager
def bars(progress: bool) -> Iterator["Progress"]:
    """Yield progress bars on standard error; without a terminal, lines in their place; or nothing that shows."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not (progress and console.is_terminal)) as shown:
        if not progress or console.is_terminal:
            yield shown
            return

        def tell() -> None:
            for task in shown.tasks[-1:]:
                logger.info("prepare: %s, %.0f%%", task.description, task.percentage)

        with heartbeat(tell):
            yield shown
