"""A run killed by SIGKILL while saving: at every step that the file system sees, and at random moments.

Whenever it dies, the newest complete checkpoint loads, is no older than the last one that the run had seen saved, and
the next run that writes leaves nothing of it behind. Writers with a planted fault show that these tests can fail.
"""

import itertools
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from reference import checkpoint, files
from reference.checkpoint import folder as checkpoint_folder
from reference.errors import CheckpointError
from tests.reference.checkpoints import STATE, saved

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    # Python 3.12 warns of threads that the child does not have: those of OpenBLAS, which it does not need.
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]


Save = Callable[[Path, int], None]


def save(folder: Path, value: int) -> None:
    """A checkpoint of half a megabyte, every tensor and entry of which is ``value``."""
    model = nn.Linear(200, 200)
    nn.init.constant_(model.weight, value)
    nn.init.constant_(model.bias, value)
    state = STATE | {"update": value, "optimizer": {0: torch.full((80_000,), float(value))}}
    checkpoint.save(folder, model, state, {"train": {"value": value}})


def value_of(folder: Path) -> int:
    """The value that :func:`save` wrote, if all parts of the checkpoint agree on it."""
    config, state, model = checkpoint.load_config(folder), checkpoint.load_state(folder), nn.Linear(200, 200)
    checkpoint.load_model(folder, model)
    tensors = [*model.parameters(), state["optimizer"][0]]
    values = {state["update"], config["train"]["value"], *(v.item() for t in tensors for v in t.aminmax())}
    assert len(values) == 1, f"parts of different checkpoints: {values}"
    return int(values.pop())


def problem_with(directory: Path, reported: int) -> str:
    """What is wrong with a directory after a kill; empty if the newest checkpoint loads and is not too old."""
    found = checkpoint.find("auto", directory)
    try:
        value = 0 if found is None else value_of(found)
    except (CheckpointError, AssertionError) as error:
        return str(error)
    return f"{value} was found, but {reported} had been saved" if value < reported else ""


def fork(action: Callable[[Callable[[int], None]], None]) -> tuple[int, int]:
    """Start ``action`` in a child. It is given a function to report numbers; the child's id and where they arrive."""
    arrives, leaves = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            action(lambda number: (os.write(leaves, b"%d " % number), None)[1])
            os._exit(0)
        except BaseException as error:  # no test may go on in the child
            os.write(2, f"the child: {error!r}\n".encode())
            os._exit(1)
    os.close(leaves)
    return child, arrives


def end(child: int, arrives: int, read: bytes = b"") -> tuple[int, int]:
    """Wait for a child: its wait status, and the last number that it reported (some of which may be read already)."""
    status = os.waitpid(child, 0)[1]
    with os.fdopen(arrives, "rb") as pipe:
        numbers = (read + pipe.read()).split()
    return status, int(numbers[-1]) if numbers else 0


# at every step ---------------------------------------------------------------------------------------------------

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def kill_at(change: int) -> None:
    """Kill this process just before its ``change``-th change of the file system from now on (Python's audit events)."""
    count = itertools.count()

    def hook(name: str, arguments: Any) -> None:
        changes = name in CHANGES or (name == "open" and arguments[2] & WRITING)
        if changes and next(count) == change:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def replaces_and_adds(directory: Path, report: Callable[[int], None], save: Save, prune: Any) -> None:
    """What a resumed run does: write a checkpoint that is there already, then the next, and remove an old one."""
    for step, value in ((2, 3), (3, 4)):
        save(directory / f"step-{step:08d}", value)
        report(value)
    prune(directory, 2)


def problem_of_next(directory: Path, save: Save, prune: Any) -> str:
    """What keeps the next run from going on, or is left behind by the one before; empty if nothing."""
    try:
        save(directory / "step-00000003", 5)
    except CheckpointError as error:
        return str(error)
    prune(directory, 2)
    left = sorted(os.listdir(directory))
    return f"{left} are left" if left != ["step-00000002", "step-00000003"] else ""


def problems_at_every_step(
    tmp_path: Path, save: Save = save, prune: Any = checkpoint.prune, since: int = 0
) -> Iterator[str]:
    """For each change of the file system: kill a run just before it, and say what is wrong then (or not)."""
    template = tmp_path / "template"
    for value in (1, 2):
        save(template / f"step-{value:08d}", value)
    for change in itertools.count(since):
        directory = shutil.copytree(template, tmp_path / str(change))

        def action(report: Callable[[int], None], directory: Path = directory, change: int = change) -> None:
            kill_at(change)
            replaces_and_adds(directory, report, save, prune)

        status, reported = end(*fork(action))
        found = problem_with(directory, max(reported, 2))
        yield found or problem_of_next(directory, save, prune)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return


def test_killed_at_every_step(tmp_path: Path) -> None:
    problems = list(problems_at_every_step(tmp_path))
    assert len(problems) > 20, "too few changes were seen"
    assert not any(problems), problems


def straight(folder: Path, value: int) -> None:
    """A fault: one that is not there yet is written under its final name."""
    if folder.exists():
        save(folder, value)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "hidden", lambda *which: which[0])
        patch.setattr(files, "replace_folder", lambda *_: None)
        save(folder, value)


def removes_first(folder: Path, value: int) -> None:
    """A fault: the checkpoint that is replaced goes before the new one has its name."""

    def replace(new: Path, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "replace_folder", replace)
        save(folder, value)


def without_tidying(folder: Path, value: int) -> None:
    """A fault: what a killed run left stays."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_folder, "tidy", files.put_back_all)
        shutil.rmtree(files.hidden(folder, "partial"), ignore_errors=True)
        save(folder, value)


def prune_in_place(directory: Path, keep_last: int) -> None:
    """A fault: a checkpoint is emptied under its own name."""
    for folder in checkpoint.checkpoints(directory)[:-keep_last]:
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ({"save": straight, "since": 12}, "SHA256SUMS is missing"),
        ({"save": removes_first, "since": 5}, "1 was found, but 2 had been saved"),
        ({"save": without_tidying}, "are left"),
        ({"prune": prune_in_place, "since": 15}, "are left"),
    ],
    ids=["straight", "removes-first", "without-tidying", "prune-in-place"],
)
def test_a_careless_writer_is_found_out_at_some_step(tmp_path: Path, fault: dict[str, Any], problem: str) -> None:
    found = next(filter(None, problems_at_every_step(tmp_path, **fault)), "nothing")
    assert problem in found


# at random moments -----------------------------------------------------------------------------------------------


def problems_at_random_moments(tmp_path: Path, kills: int, save: Save = save) -> Iterator[str]:
    """One run that saves every update, twice each, and keeps two; killed again and again, and resumed each time."""
    draw, directory, reported = random.Random(kills), tmp_path / "out", 0

    def resumed(report: Callable[[int], None]) -> None:
        found = checkpoint.find("auto", directory)
        first = 1 if found is None else value_of(found) + 1
        for value in itertools.count(first):
            save(directory / f"step-{value // 2:08d}", value)
            report(value)
            checkpoint.prune(directory, 2)

    seconds = 0.0
    for _ in range(kills):
        child, arrives = fork(resumed)
        read = os.read(arrives, 8)  # it has saved once
        if not seconds:
            started = time.perf_counter()
            read += os.read(arrives, 8)
            seconds = time.perf_counter() - started
        time.sleep(draw.uniform(0, 3 * seconds))
        os.kill(child, signal.SIGKILL)
        status, last = end(child, arrives, read)
        assert os.WIFSIGNALED(status), "the run ended by itself"
        reported = max(reported, last)
        yield problem_with(directory, reported)
    assert reported >= kills, "not every run got on"


def copies(folder: Path, value: int) -> None:
    """A fault: the files are copied into the folder of that name, one by one, on a slow disk."""

    def copy(new: Path, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        for path in new.iterdir():
            shutil.copy(path, folder)
            time.sleep(0.003)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "replace_folder", copy)
        save(folder, value)


@pytest.mark.parametrize(
    "kills", [15, pytest.param(300, marks=pytest.mark.slow), pytest.param(2000, marks=pytest.mark.kills)]
)
def test_killed_at_random_moments(tmp_path: Path, kills: int) -> None:
    problems = list(problems_at_random_moments(tmp_path, kills))
    assert len(problems) == kills
    assert not any(problems), problems


def test_a_careless_writer_is_found_out_at_some_moment(tmp_path: Path) -> None:
    assert any(problems_at_random_moments(tmp_path, 100, copies))


# by power, not by a signal ---------------------------------------------------------------------------------------


def test_all_is_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not flushed is lost with the power, even after a rename (the rename may reach the disk first)."""
    flushed, named, rename = set(), [], Path.rename

    def note_flush(descriptor: int) -> None:
        flushed.add((os.fstat(descriptor).st_ino, os.fstat(descriptor).st_mtime_ns))

    def note_rename(path: Path, target: Path) -> Path:
        inside = [path, *path.iterdir()]
        named.append([p.name for p in inside if (p.stat().st_ino, p.stat().st_mtime_ns) not in flushed])
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_flush)
    monkeypatch.setattr(Path, "rename", note_rename)
    saved(tmp_path)
    assert named == [[]], "written, but not flushed before it got its name"
    assert (tmp_path.stat().st_ino, tmp_path.stat().st_mtime_ns) in flushed, "the name itself is not flushed"
