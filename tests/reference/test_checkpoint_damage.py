"""Checkpoints that are damaged, forged or cannot be written: refused in one sentence, and nothing is lost."""

import errno
import math
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from reference import checkpoint
from reference.checkpoint.folder import FILES
from reference.config import TrainConfig
from reference.errors import CheckpointError
from reference.files import is_intact
from reference.training.trainer import Trainer
from tests.reference.checkpoints import STATE, gpt, load, saved, sum_up
from tests.sentences import sentence_of

ALL_FILES = (*FILES, "SHA256SUMS")


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# disks that do not take it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["os.fsync", "torch.save", "safetensors.torch.save_file", "pathlib.Path.rename"])
@pytest.mark.parametrize("update", [1, 2], ids=["same-step", "next-step"])
def test_a_failed_write_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, update: int
) -> None:
    previous = saved(tmp_path, update=1, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(target, full_disk)
        message = sentence_of(CheckpointError, lambda: saved(tmp_path, update=update, seed=2))
    assert "could not be written: No space left on device. Earlier checkpoints are complete; " in message
    assert checkpoint.find(True, tmp_path) == previous
    assert checkpoint.load_config(previous)["train"] == {"seed": 1}
    assert os.listdir(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("room", [0, 50, 1000, 6000, 12000, 20500], ids=str)
def test_a_disk_that_is_really_full(tmp_path: Path, room: int) -> None:
    """As above with the kernel's own error, which safetensors and torch.save report in exceptions of their own."""
    resource = pytest.importorskip("resource", reason="limits on the size of files are Unix's")
    previous = saved(tmp_path, update=1)
    assert (previous / "state.pt").stat().st_size > 20500
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        message = sentence_of(CheckpointError, lambda: saved(tmp_path, update=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "could not be written: " in message
    assert "File too large" in message, "torch's own words about it say nothing to a reader"
    assert os.listdir(tmp_path) == [previous.name]
    load(previous)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission(tmp_path: Path) -> None:
    previous = saved(tmp_path, update=1)
    tmp_path.chmod(0o500)
    try:
        assert "Permission denied" in sentence_of(CheckpointError, lambda: saved(tmp_path, update=2))
        assert "Permission denied" in sentence_of(CheckpointError, lambda: checkpoint.require_writable(tmp_path))
        load(previous)
    finally:
        tmp_path.chmod(0o700)


def test_a_file_in_the_place_of_the_directory(tmp_path: Path) -> None:
    taken = tmp_path / "out"
    taken.write_text("my notes")
    assert f"the checkpoint {taken / 'step-00000001'} could not be written: " in sentence_of(
        CheckpointError, lambda: saved(taken)
    )
    message = sentence_of(CheckpointError, lambda: checkpoint.require_writable(taken))
    assert message == f"checkpoints cannot be written to {taken}: File exists. Choose a directory that can be written."
    assert "holds no checkpoint" in sentence_of(CheckpointError, lambda: checkpoint.find(True, taken))
    assert taken.read_text() == "my notes"


def test_a_file_in_the_place_of_the_checkpoint(tmp_path: Path) -> None:
    taken = tmp_path / "step-00000001"
    taken.write_text("my notes")
    assert "could not be written: " in sentence_of(CheckpointError, lambda: saved(tmp_path))
    assert taken.read_text() == "my notes"
    assert os.listdir(tmp_path) == [taken.name]


def test_a_directory_that_can_be_written(tmp_path: Path) -> None:
    checkpoint.require_writable(tmp_path / "new" / "folder")
    assert os.listdir(tmp_path / "new" / "folder") == []


class WithExtraState(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}


@pytest.mark.parametrize(
    ("model", "state", "problem"),
    [
        (gpt(), {"update": math.floor}, "its state holds math.floor, where only tensors and plain values load safely."),
        (gpt(), {"update": lambda: 1}, "Can't "),  # pickle, in different words by Python's version
        (WithExtraState(2, 2), {}, "'_extra_state' in the state dict of the module is a dict, not a tensor."),
    ],
    ids=["function", "lambda", "extra-state"],
)
def test_what_could_not_be_loaded_again_is_not_written(
    tmp_path: Path, model: nn.Module, state: dict[str, Any], problem: str
) -> None:
    previous = saved(tmp_path, 1)
    folder = checkpoint.step_folder(tmp_path, 2)
    message = sentence_of(CheckpointError, lambda: checkpoint.save(folder, model, STATE | state, {}))
    assert message.startswith(f"the checkpoint {folder} could not be written: {problem}")
    assert os.listdir(tmp_path) == [previous.name]


# files that are damaged ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 4, 50, 0.5, -5], ids=str)
@pytest.mark.parametrize("name", ALL_FILES)
def test_a_truncated_file(tmp_path: Path, name: str, kept: float) -> None:
    folder = saved(tmp_path)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2 if kept == 0.5 else int(kept)])
    message = sentence_of(CheckpointError, lambda: load(folder))
    assert message.startswith(f"{folder}{os.sep}")
    assert "SHA256SUMS" in message if name == "SHA256SUMS" else f"{name} is damaged (" in message
    assert message.endswith(": no earlier checkpoint beside it is intact.")


@pytest.mark.parametrize("name", ALL_FILES)
def test_one_flipped_bit(tmp_path: Path, name: str) -> None:
    folder, draw = saved(tmp_path), random.Random(name)
    path = folder / name
    content = path.read_bytes()
    for _ in range(40):
        flipped = bytearray(content)
        flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=r"is damaged|SHA256SUMS"):
            load(folder)
    path.write_bytes(content)
    load(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_checkpoint(tmp_path: Path, name: str) -> None:
    folder, other = saved(tmp_path, 2, seed=1), checkpoint.step_folder(tmp_path / "other", 2)
    checkpoint.save(other, gpt(seed=2), STATE | {"update": 8}, {"train": {"seed": 2}})
    shutil.copy(other / name, folder / name)
    assert sentence_of(CheckpointError, lambda: load(folder)).startswith(
        f"{folder / name} is damaged (its checksum is not the one in "
    )


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(tmp_path: Path, name: str) -> None:
    (saved(tmp_path) / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} cannot be read \\(No such file or directory\\): no earlier"):
        load(tmp_path / "step-00000001")


def test_missing_checksums(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / "SHA256SUMS").unlink()
    assert sentence_of(CheckpointError, lambda: load(folder)).startswith(f"{folder / 'SHA256SUMS'} is missing: ")


def test_the_error_names_the_newest_intact_checkpoint_before(tmp_path: Path) -> None:
    first, second, third, fourth = (saved(tmp_path, update) for update in (1, 2, 3, 4))
    for folder in (second, third):
        (folder / "state.pt").write_bytes(b"damaged")
    assert [is_intact(folder) for folder in (first, second, third, fourth)] == [True, False, False, True]
    message = sentence_of(CheckpointError, lambda: load(third))
    assert message.endswith(f"not the one in SHA256SUMS): resume from {first} instead.")
    trainer = Trainer(gpt(), TrainConfig(accelerator="cpu", updates=9), tmp_path)
    with pytest.raises(CheckpointError, match=f"resume from {first} instead"):
        trainer.fit([torch.ones(1, 3, dtype=torch.long)], resume=third)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -5], ids=str)
@pytest.mark.parametrize("name", ["model.safetensors", "state.pt"])
def test_a_truncated_file_of_the_first_release(tmp_path: Path, name: str, kept: float) -> None:
    """Without checksums it is the reader who notices."""
    folder = saved(tmp_path)
    (folder / "SHA256SUMS").unlink()
    (folder / "config.json").write_text('{"train": {}}')
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2 if kept == 0.5 else int(kept)])
    message = sentence_of(CheckpointError, lambda: load(folder))
    assert message.startswith(
        f"{folder / name} {'is damaged (' if name == 'model.safetensors' else 'cannot be read ('}"
    )


# files that are forged, with checksums that fit ------------------------------------------------------------------


class Hostile:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("way", ["torch.save", "pickle"])
def test_a_hostile_state_runs_no_code(tmp_path: Path, way: str) -> None:
    folder, trace = saved(tmp_path), tmp_path / "trace"
    path = folder / "state.pt"
    payload = {"update": 1, "optimizer": Hostile(trace)}
    if way == "torch.save":
        torch.save(payload, path)
    else:
        path.write_bytes(pickle.dumps(payload, protocol=2))
    sum_up(folder)
    message = sentence_of(CheckpointError, lambda: checkpoint.load_state(folder))
    assert message.startswith(f"{path} cannot be read (damaged, or more than tensors and values)")
    assert not trace.exists()
    assert "weights_only" not in message, "torch's advice, to switch the protection off, is passed on"
    torch.load(path, weights_only=False) if way == "torch.save" else pickle.loads(path.read_bytes())
    assert trace.exists(), "the payload was harmless, so nothing was tested"


@pytest.mark.parametrize("content", [[1, 2], {"update": 1}], ids=["list", "incomplete"])
def test_a_state_of_another_program(tmp_path: Path, content: Any) -> None:
    folder = saved(tmp_path)
    torch.save(content, folder / "state.pt")
    sum_up(folder)
    trainer = Trainer(gpt(), TrainConfig(accelerator="cpu", updates=9), tmp_path)
    message = sentence_of(CheckpointError, lambda: trainer.fit([torch.ones(1, 3, dtype=torch.long)], resume=True))
    assert message.startswith(f"{folder / 'state.pt'} was not written by this trainer: it lacks some of optimizer, ")


@pytest.mark.parametrize("content", ["{", "[]", '"text"', ""])
def test_a_config_that_is_none(tmp_path: Path, content: str) -> None:
    folder = saved(tmp_path)
    (folder / "config.json").write_text(content)
    sum_up(folder)
    assert "config.json cannot be read (" in sentence_of(CheckpointError, lambda: checkpoint.load_config(folder))


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"train": {}}, "holds a module that is not reference.GPT: build it yourself and use load_model."),
        ({"model": {"width": 3}}, "config.json does not describe a model of this version: "),
        (
            {"model": {"n_layer": 0}},
            "config.json does not describe a model of this version: n_layer is 0, but must be",
        ),
    ],
    ids=["foreign", "newer", "impossible"],
)
def test_a_checkpoint_that_describes_no_gpt(tmp_path: Path, config: dict[str, Any], problem: str) -> None:
    folder = checkpoint.step_folder(tmp_path, 1)
    checkpoint.save(folder, gpt(), STATE, config)
    assert problem in sentence_of(CheckpointError, lambda: checkpoint.load_for_inference(folder))
