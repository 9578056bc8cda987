"""Records as documents: the text of one field of JSON lines, CSV or Parquet files, a document for each record.

The texts go one after the other into one temporary file, of which each document is a part: so all that follows reads
records as it reads text files, and no file of records has to fit into memory.
"""

import csv
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from reference.data.chat import ChatTemplate, Unsuited
from reference.data.documents import Document, document_key
from reference.errors import ConfigurationError, DataError

SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
LONGEST = 1 << 26  # characters of one field of a CSV file


def examine_records(
    paths: list[Path], field: str, seed: int, spool: BinaryIO, template: Callable[[], ChatTemplate]
) -> tuple[list[Document], list[tuple[Path, str]], ChatTemplate | None]:
    """Write the texts of a field into a file.

    If the first record that has the field holds a list there, all of them are chats: then what is written is each
    conversation as :class:`Conversation` dumps it.

    Args:
        paths: files of records.
        field: the name of the field, or column, that holds the text.
        seed: of the digests.
        spool: an open file, with a name, that takes the texts.
        template: returns the chat template; called once, if there are chats.

    Returns:
        The documents, sorted by digest; the records left out, with reasons; and the chat template if they are chats.

    Raises:
        DataError: if a file is of another kind or damaged, no record has the field, or nothing is left.
        ConfigurationError: if a Parquet file needs a package that is missing, or chats a template.
    """
    documents: dict[bytes, Document] = {}
    skipped: list[tuple[Path, str]] = []
    names: dict[str, None] = {}  # of fields, for a message
    chats: ChatTemplate | None = None
    for path in paths:
        for number, record in enumerate(records_of(path), start=1):
            origin, text = Path(f"{path}:{number}"), record.get(field)
            if chats is None and not documents and isinstance(text, list):
                chats = template()
            if chats is not None:
                try:
                    text = chats.conversation(text).dumped().decode()
                except Unsuited as error:
                    skipped.append((origin, str(error)))
                    continue
            if not isinstance(text, str):
                names |= dict.fromkeys(map(str, record))
                skipped.append((origin, f"no text in the field {field}"))
                continue
            try:
                content = text.encode()
            except UnicodeEncodeError:  # an escaped half of a surrogate pair
                skipped.append((origin, "not UTF-8"))
                continue
            key = document_key(content, seed)
            if not content or b"\0" in content or key in documents:
                skipped.append((origin, "copy of another" if key in documents else "empty, or holds NUL bytes"))
                continue
            start = spool.tell()
            spool.write(content)
            documents[key] = Document(Path(spool.name), key, start, start + len(content), origin=origin)
    spool.flush()
    if not documents and chats is not None:
        origin, reason = skipped[0]
        raise DataError(f"no conversation is left of {len(skipped):,}; the first, {origin}: {reason}.")
    if not documents:
        if not skipped:
            raise DataError(f"there is no record in {', '.join(map(str, paths[:3]))}: give files that hold some.")
        origin, reason = skipped[0]
        if not names:
            raise DataError(f"no record is left of {len(skipped):,}; the first, {origin}: {reason}.")
        there = ", ".join(list(names)[:10])
        raise DataError(
            f"no record has text in the field {field!r} (their fields are: {there}): name one of them with --field."
        )
    return [documents[key] for key in sorted(documents)], skipped, chats


def records_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a file, by the kind that its name tells.

    Raises:
        DataError: if it is of another kind, cannot be read or is damaged.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path} is not a file of records ({', '.join(SUFFIXES)}): leave it out, or leave out --field.")
    try:
        if suffix == ".parquet":
            yield from parquet_records(path)
        elif suffix in (".csv", ".tsv"):
            csv.field_size_limit(min(LONGEST, sys.maxsize))
            with path.open(newline="", encoding="utf-8-sig") as lines:
                yield from csv.DictReader(lines, delimiter="\t" if suffix == ".tsv" else ",")
        else:
            yield from json_records(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: convert it first.") from error
    except csv.Error as error:
        raise DataError(f"{path} is not a CSV file ({error}): correct it, or write it anew.") from error


def json_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file with one JSON object a line; empty lines do not count."""
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"line {number} of {path} is not JSON: write one object on each line.") from error
            if not isinstance(record, dict):
                raise DataError(f'line {number} of {path} is not a JSON object, such as {{"text": "..."}}.')
            yield record


def parquet_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file, read some at a time."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ConfigurationError(
            f"{path} needs the package pyarrow: run pip install 'gpt-conformance[parquet]'."
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except ArrowException as error:
        raise DataError(f"{path} is not a Parquet file, or it is damaged: get it again.") from error
