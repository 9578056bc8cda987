"""A disk that is full, and one that is read-only: real ones, in memory, in a mount namespace of a forked child.

Where the machine allows no mount these are skipped; test_checkpoint_damage.py simulates the same everywhere.
"""

import contextlib
import ctypes
import errno
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.fabric  # noqa: F401 # now: the child should not wait for it
import pytest
import torch

from reference import checkpoint
from reference.__main__ import main
from tests.reference.commands import TEXT, train, write_data

NEW_NAMESPACE, NEW_USER = 0x20000, 0x10000000  # CLONE_NEWNS and CLONE_NEWUSER of Linux
READ_ONLY, REMOUNT, ALL_PRIVATE = 1, 32, 0x4000 | 0x40000  # MS_RDONLY, MS_REMOUNT, MS_REC | MS_PRIVATE
NOT_ALLOWED = 77
pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork") or not Path("/proc/self/ns/mnt").exists(), reason="needs Linux"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]


def mount(folder: Path, kind: str, flags: int = 0, options: str = "") -> None:
    """Mount a file system."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(kind.encode(), str(folder).encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()):
        raise OSError(ctypes.get_errno(), f"mount of {kind} failed")


def on_a_disk_of_its_own(folder: Path, size: str, action: Callable[[Path], Any]) -> Any:
    """Return what ``action`` gives, called in a child that sees a new file system of that size at ``folder``."""
    folder.mkdir()
    arrives, leaves = os.pipe()
    child = os.fork()
    if child == 0:
        code = NOT_ALLOWED
        try:
            user, group = os.getuid(), os.getgid()
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.unshare(NEW_USER | NEW_NAMESPACE):
                raise OSError(ctypes.get_errno(), "unshare failed")
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
            Path("/proc/self/gid_map").write_text(f"0 {group} 1")
            mount(Path("/"), "none", ALL_PRIVATE)
            mount(folder, "tmpfs", options=f"size={size}")
            code = 1
            os.write(leaves, json.dumps(action(folder)).encode())
            code = 0
        except BaseException as error:  # no test may go on in the child
            os.write(leaves, repr(error).encode()[:4000])
        finally:
            os._exit(code)
    os.close(leaves)
    with os.fdopen(arrives, "rb") as pipe:
        told = pipe.read().decode()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == NOT_ALLOWED:
        pytest.skip(f"this machine allows no mount of its own: {told}")
    assert code == 0, told
    return json.loads(told)


def told(run: Callable[[], int]) -> tuple[int, str]:
    """Exit code of a command, and the last line that it printed on stderr."""
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        code = run()
    assert "Traceback" not in err.getvalue()
    return code, (err.getvalue().splitlines() or [""])[-1]


def fill(folder: Path, left: int) -> None:
    """Leave so many bytes of a disk free."""
    with contextlib.suppress(OSError), open(folder / "ballast", "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 12))
    os.truncate(folder / "ballast", max(0, os.path.getsize(folder / "ballast") - left))


def test_a_full_disk_costs_no_earlier_checkpoint(tmp_path: Path) -> None:
    data = str(write_data(tmp_path / "data"))

    def action(disk: Path) -> Any:
        run = disk / "run"
        found: dict[str, Any] = {"first": told(lambda: train(data, "--directory", str(run)))}
        for left in (0, 1 << 14, 1 << 15, 1 << 16):  # until nothing fits, or some files of a checkpoint do
            fill(disk, left)
            more = ("--directory", str(run), "--resume", "auto", "--train.updates", "8")
            found[str(left)] = told(lambda more=more: train(data, *more))  # type: ignore[misc] # a default
            os.remove(disk / "ballast")
            folder = checkpoint.find("auto", run)
            assert folder is not None
            found[f"whole {left}"] = [folder.name, checkpoint.load_state(folder)["update"]]
            assert torch.isfinite(checkpoint.load_for_inference(folder).head.weight).all()
        found["then"] = told(lambda: train(data, *more))
        found["left"] = sorted(path.name for path in run.iterdir() if path.name.startswith("."))
        return found

    found = on_a_disk_of_its_own(tmp_path / "disk", "600k", action)
    assert found["first"][0] == found["then"][0] == 0
    assert found["left"] == []
    for left in ("0", str(1 << 14), str(1 << 15)):
        code, line = found[left]
        assert code == 1, found
        assert line.startswith("error: "), found
        assert os.strerror(errno.ENOSPC) in line, found
        name, update = found[f"whole {left}"]
        assert (name, update) == ("step-00000004", 4)


def test_a_full_disk_is_told_by_prepare(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(TEXT * 99)

    def action(disk: Path) -> Any:
        fill(disk, 1 << 13)
        words = ["prepare", "--text", str(tmp_path / "text.txt"), "--out", str(disk / "data")]
        code, line = told(lambda: main(words))
        return code, line, sorted(path.name for path in disk.rglob("*.bin"))

    code, line, left = on_a_disk_of_its_own(tmp_path / "disk", "100k", action)
    assert (code, left) == (1, [])
    assert os.strerror(errno.ENOSPC) in line


def test_a_disk_that_is_read_only(tmp_path: Path) -> None:
    def action(disk: Path) -> Any:
        data, run = str(write_data(disk / "data")), str(disk / "run")
        assert told(lambda: train(data, "--directory", run))[0] == 0
        before = sorted(str(path) for path in disk.rglob("*"))
        mount(disk, "tmpfs", REMOUNT | READ_ONLY)
        found = [
            told(lambda: train(data, "--directory", run, "--resume", "auto", "--train.updates", "8")),
            told(lambda: train(data, "--directory", str(disk / "new"))),
            told(lambda: main(["prepare", "--text", data, "--out", str(disk / "more")])),
            told(lambda: main(["export", "--checkpoint", run, "--out", str(disk / "exported")])),
            told(lambda: main(["evaluate", "--checkpoint", run, "--data", data])),
            told(lambda: main(["generate", "--checkpoint", run, "--tokens", "2"])),
        ]
        assert sorted(str(path) for path in disk.rglob("*")) == before
        return found

    *writing, evaluating, generating = on_a_disk_of_its_own(tmp_path / "disk", "4m", action)
    for code, line in writing:
        assert code in (1, 2)
        assert line.startswith("error: ")
        assert len(line) < 400
    assert [os.strerror(errno.EROFS) in line for _, line in writing[:2]] == [True, True]
    assert (evaluating[0], generating[0]) == (0, 0), "what only reads works there"
