"""Folders that are there whole or not at all, and files that are read as they were written.

A folder is written under a hidden name, forced onto the disk and renamed. SHA256SUMS in it has a checksum of each file.

The checksums find damage. They do not keep out somebody who writes new ones beside a forged file; against code in such
a file stands torch's ``weights_only``. SHA-256, because every system has a tool for it (``sha256sum -c SHA256SUMS``)
and recent processors have instructions for it: 1.8 GB/s on one core, where BLAKE2b makes 1.3 and CRC-32 5.4.
"""

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

SUMS = "SHA256SUMS"


def flush(path: Path) -> None:
    """Force a file's content, or a folder's entries, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(path: Path) -> str:
    """Force the content of a file onto the disk; its SHA-256."""
    flush(path)
    return digest(path)


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Write ``{file: SHA-256}``, and force it and the entries of the folder onto the disk."""
    lines = [f"{value}  {name}\n" for name, value in sums.items()]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")
    flush(folder / SUMS)
    flush(folder)


def read_sums(folder: Path) -> dict[str, str] | None:
    """``{file: SHA-256}`` as written; None if there is no such file."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return {name: value for value, _, name in (line.partition("  ") for line in lines)}


def require_loadable(path: Path) -> None:
    """Raise ValueError if ``weights_only`` would refuse a file of torch.save: now, not when a run is to be resumed."""
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # mapped, so no tensor is read
    except Exception as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"its state holds {found[1] if found else 'an object'}, where only tensors and plain values load safely"
        ) from error


def as_written(folder: Path) -> bool:
    """Whether every file of a folder that has checksums still has its own."""
    sums = read_sums(folder)
    try:
        return bool(sums) and all(digest(folder / name) == value for name, value in (sums or {}).items())
    except OSError:
        return False


def hidden(folder: Path, purpose: str) -> Path:
    """The name beside ``folder`` under which it is written, set aside or removed; never taken for a checkpoint."""
    return folder.with_name(f".{folder.name}.{purpose}")


def replace_folder(new: Path, folder: Path) -> None:
    """Give ``new`` the name ``folder``. One that is there (of a run that this one resumes) goes when that is done."""
    previous = hidden(folder, "previous")
    if folder.is_dir():
        folder.rename(previous)
    try:
        new.rename(folder)
    except OSError:
        recover(folder.parent)
        raise
    flush(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)


def recover(directory: Path) -> None:
    """Put back checkpoints that a run set aside, and was killed before it had put the new one in their place."""
    for previous in directory.glob(".step-*.previous"):
        folder = directory / previous.stem.removeprefix(".")
        if not folder.exists():
            with contextlib.suppress(OSError):  # another rank was quicker, or the folder is only to be read
                previous.rename(folder)


def tidy(directory: Path) -> None:
    """Recover, then remove what killed runs left half written or half removed. Only for who writes there next."""
    recover(directory)
    left = [path for purpose in ("partial", "previous", "removed") for path in directory.glob(f".step-*.{purpose}")]
    for path in left:
        if path.suffix != ".previous" or (directory / path.stem.removeprefix(".")).exists():
            shutil.rmtree(path, ignore_errors=True)
