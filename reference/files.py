"""Files and folders that are there whole or not at all, and that are read as they were written.

Everything that the reference keeps (checkpoints, token files, exports, config.yaml) is written by this module: under a
hidden name beside its own, forced onto the disk, and then renamed. SHA256SUMS in a folder has a checksum of each file,
in the format of ``sha256sum -c SHA256SUMS``.

The checksums find damage. They do not keep out somebody who writes new ones beside a forged file; against code in such
a file stands torch's ``weights_only``. SHA-256, because every system has a tool for it and recent processors have
instructions for it: 1.8 GB/s on one core, where BLAKE2b makes 1.3 and CRC-32 5.4.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from reference.errors import CheckpointError

SUMS = "SHA256SUMS"
ABANDONED = 86400  # seconds without a write after which a partial file belongs to a process that was killed


# one file --------------------------------------------------------------------------------------------------------


def write_file(path: Path, content: bytes) -> None:
    """Write a small file, which appears whole or not at all.

    Raises:
        OSError: if the disk does not take it; a file that was there is untouched then.
    """
    partial = partial_file(path)
    try:
        partial.write_bytes(content)
        flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_file(path: Path, most: int = 1 << 28) -> bytes:
    """Return the content of a file that somebody named, of at most ``most`` bytes.

    Raises:
        OSError: if it is missing, too large, or a device or pipe, which might never end.
    """
    try:
        found = path.stat()
    except ValueError as error:  # a NUL in its name
        raise OSError(errno.EINVAL, "its name holds a NUL character", str(path)) from error
    if not stat.S_ISREG(found.st_mode):
        code = errno.EISDIR if stat.S_ISDIR(found.st_mode) else errno.EINVAL
        raise OSError(code, "it is a folder, not a file" if code == errno.EISDIR else "it is not a file", str(path))
    if found.st_size > most:
        raise OSError(errno.EFBIG, f"it has {found.st_size:,} bytes, but at most {most:,} are allowed", str(path))
    return path.read_bytes()


def read_json(path: Path, most: int = 1 << 24) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        OSError: if it cannot be read, see :func:`read_file`.
        ValueError: if it holds something else, or is nested too deeply.
    """
    try:
        content = json.loads(read_file(path, most))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"it must hold an object, but holds {type(content).__name__}")
    return content


def partial_file(path: Path) -> Path:
    """Make a new hidden file beside ``path``, which no other process writes to, and return its path."""
    for left in path.parent.glob(f".{path.name}.*.partial"):
        with contextlib.suppress(OSError):  # another process removed it
            if left.stat().st_mtime < time.time() - ABANDONED:
                left.unlink()
    # Not by tempfile: only their owner can read its files, but data is shared as the system's umask says.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    partial.touch(exist_ok=False)
    return partial


def flush(path: Path) -> None:
    """Force the content of a file, or the entries of a folder, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# checksums -------------------------------------------------------------------------------------------------------


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def format_sums(sums: Mapping[str, str]) -> bytes:
    """Return the content of SHA256SUMS for ``{file: SHA-256}``."""
    return "".join(f"{value}  {name}\n" for name, value in sums.items()).encode()


def read_sums(folder: Path) -> dict[str, str] | None:
    """Return ``{file: SHA-256}`` as it was written, or None if the folder has no SHA256SUMS.

    Lines that name no file of this folder are left out, so that nothing elsewhere is read for them.
    """
    try:
        lines = read_file(folder / SUMS, 1 << 24).decode(errors="replace").split("\n")
    except OSError:
        return None
    named = {name: value for value, _, name in (line.removesuffix("\r").partition("  ") for line in lines)}
    return {n: value for n, value in named.items() if not {"/", "\\", "\0"} & set(n) and 0 < len(n.encode()) < 256}


def is_intact(folder: Path) -> bool:
    """Return whether a folder has checksums, and every file still has its own."""
    sums = read_sums(folder)
    try:
        return bool(sums) and all(digest(folder / name) == value for name, value in (sums or {}).items())
    except OSError:
        return False


# a folder --------------------------------------------------------------------------------------------------------

Write = Callable[[Path], object]  # writes a file at the path it is given


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Callable[[str, Write], None]]:
    """Fill a folder with files and SHA256SUMS; it appears when the block ends, or not at all if that raises.

    Only one process at a time may write a folder of that name. One that is there is replaced.

    Yields:
        ``add(name, write)``: calls ``write`` with the path to write the file to. While the next file is written, a
        thread forces this one onto the disk and sums it up.

    Raises:
        OSError: if the disk does not take it. A folder that was there is untouched then.
    """
    partial, sums = hidden(folder, "partial"), dict[str, Future[str]]()

    def add(name: str, write: Write) -> None:
        write(partial / name)
        sums[name] = pool.submit(seal, partial / name)

    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        partial.mkdir(parents=True)
        with ThreadPoolExecutor(2) as pool:
            yield add
            (partial / SUMS).write_bytes(format_sums({name: future.result() for name, future in sums.items()}))
        flush(partial / SUMS)
        flush(partial)
        replace_folder(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def seal(path: Path) -> str:
    """Force the content of a file onto the disk and return its SHA-256."""
    flush(path)
    return digest(path)


def hidden(folder: Path, purpose: str) -> Path:
    """Return the name beside ``folder`` under which it is written, set aside or removed."""
    return folder.with_name(f".{folder.name}.{purpose}")


def replace_folder(new: Path, folder: Path) -> None:
    """Give ``new`` the name ``folder``. A folder of that name is set aside first, and removed when that is done."""
    previous = hidden(folder, "previous")
    if folder.is_dir():
        folder.rename(previous)
    try:
        new.rename(folder)
    except OSError:
        put_back(previous, folder)
        raise
    flush(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)


def put_back(previous: Path, folder: Path) -> None:
    """Give a folder its name again that was set aside, where nothing has taken its place."""
    if previous.is_dir() and not folder.exists():
        with contextlib.suppress(OSError):  # another rank was quicker, or the folder is only to be read
            previous.rename(folder)


def recover(directory: Path, pattern: str) -> None:
    """Put back folders that a process set aside, and was killed before it had put the new one in their place.

    Not while another process holds the directory's lock: it may have set one aside for a moment.
    """
    with lock(directory) as alone:
        if alone:
            put_back_all(directory, pattern)


def put_back_all(directory: Path, pattern: str) -> None:
    """See :func:`recover`; for who holds the lock."""
    for previous in directory.glob(f".{pattern}.previous"):
        put_back(previous, directory / previous.stem.removeprefix("."))


def tidy(directory: Path, pattern: str) -> None:
    """Put back, then remove what killed processes left half written or half removed. Only for who writes there next."""
    put_back_all(directory, pattern)
    for purpose in ("partial", "previous", "removed"):
        for left in directory.glob(f".{pattern}.{purpose}"):
            if purpose != "previous" or (directory / left.stem.removeprefix(".")).exists():
                shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[bool]:
    """Hold the lock of a directory in the block, and yield whether this could be had: false if another run holds it.

    It is the system's own, on the directory itself, so it leaves no file and ends with the process, however that ends.
    Where there is no such lock (no directory, Windows, some network disks), it yields true.
    """
    try:
        import fcntl

        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)  # a pipe would be waited for
    except (ImportError, OSError, ValueError):  # the last: a NUL in its name
        yield True
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except OSError as error:
            free = error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
        yield free
    finally:
        os.close(descriptor)


def require_alone(directory: Path, held: contextlib.ExitStack) -> None:
    """Take the lock of a directory until ``held`` ends, or raise CheckpointError if another run has it."""
    if not held.enter_context(lock(directory)):
        raise CheckpointError(
            f"another run is writing to {directory}: wait until it has ended, or choose another directory."
        )


def require_utf8(directory: Path) -> None:
    """Raise CheckpointError if the name of a directory has bytes that are no text: torch and safetensors refuse it."""
    try:
        str(directory).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"the name of the directory {str(directory)!a} is not UTF-8, and torch cannot read files there: "
            "choose another."
        ) from error


def require_writable(directory: Path) -> None:
    """Raise CheckpointError if nothing can be written there. For the start of a run, before hours are spent."""
    require_utf8(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise CheckpointError(
            f"checkpoints cannot be written to {directory}: {error.strerror}. Choose a directory that can be written."
        ) from error
