"""Read the files that a user names: of bounded size, and no device or pipe. Each mistake is one sentence."""

import json
import stat
from pathlib import Path
from typing import Any

from conformance.errors import UsageError

MOST = 1 << 26
"""Bytes of a file. The largest that the project writes, a summary of the bench with all its samples, has some 2 MB."""


def require_file(path: Path, kind: str, most: int | None = MOST) -> None:
    """Raise UsageError, calling the file a ``kind``, unless it is a regular one of at most ``most`` bytes."""
    try:
        found = path.stat()
    except OSError as error:
        raise UsageError(f"the {kind} {path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise UsageError(f"the {kind} {str(path)!r} cannot be read: its name holds a NUL character.") from error
    if stat.S_ISDIR(found.st_mode):
        raise UsageError(f"the {kind} {path} cannot be read: it is a folder, not a file.")
    if not stat.S_ISREG(found.st_mode):  # it might never end
        raise UsageError(f"the {kind} {path} cannot be read: it is not a regular file.")
    if most is not None and found.st_size > most:
        raise UsageError(
            f"the {kind} {path} cannot be read: it has {found.st_size:,} bytes, but at most {most:,} are allowed."
        )


def read_text(path: Path, kind: str, most: int = MOST) -> str:
    """Return the text of a file that a user named.

    Args:
        path: of the file.
        kind: what to call it, such as ``result file``.
        most: bytes that it may have.

    Raises:
        UsageError: if it cannot be read, is too large, is not a regular file, or is not UTF-8.
    """
    require_file(path, kind, most)
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"the {kind} {path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"the {kind} {path} is not UTF-8 text: {error.reason} at byte {error.start:,}.") from error


def make_folder(folder: Path, option: str) -> Path:
    """Make the folder that a user gave to an option, unless it is there, and return it.

    Raises:
        UsageError: if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, RecursionError) as error:  # a NUL or half a character; thousands of levels
        reason = getattr(error, "strerror", None) or "no folder can have this name"
        if isinstance(error, FileExistsError):
            raise UsageError(f"{folder}, given to {option}, is a file: give a folder.") from error
        raise UsageError(f"the folder {folder}, given to {option}, cannot be made: {reason}.") from error
    return folder


def read_json(path: Path, kind: str) -> Any:
    """Return what a JSON file holds. Raises UsageError if it cannot be read, or holds something else."""
    try:
        found = json.loads(read_text(path, kind))
        json.dumps(found, ensure_ascii=False).encode()
        return found
    except RecursionError as error:
        raise UsageError(f"the {kind} {path} cannot be read: it is nested too deeply.") from error
    except UnicodeEncodeError as error:  # half of a pair, as in "\ud800", which no page could show
        raise UsageError(f"the {kind} {path} holds {error.object[error.start]!a}, half a character.") from error
    except ValueError as error:
        raise UsageError(f"the {kind} {path} is not JSON: {str(error).splitlines()[0]}.") from error
