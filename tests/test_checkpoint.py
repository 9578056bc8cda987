"""Checkpoints: complete or absent; damaged, hostile and foreign ones are refused in one sentence."""

import errno
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from safetensors import safe_open

from reference import checkpoint
from reference.checkpoint import CheckpointError
from reference.config import GPTConfig, TrainConfig, as_plain
from reference.model import GPT
from reference.trainer import Trainer

TINY: dict[str, Any] = {"vocab_size": 16, "block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 8}
STATE: dict[str, Any] = {
    "update": 7,
    "optimizer": {0: torch.arange(5000.0)},
    "precision": {},
    "optimizer_class": "torch.optim.AdamW",
    "stable_embedding": False,
}


def gpt(seed: int = 1, **changes: Any) -> GPT:
    return GPT(GPTConfig.gpt2(**{**TINY, **changes}), seed)


def saved(directory: Path, update: int = 1, seed: int = 1) -> Path:
    folder = checkpoint.step_folder(directory, update)
    checkpoint.save(folder, gpt(seed), STATE, {"train": {"seed": seed}})
    return folder


def sentence_of(action: Callable[[], Any]) -> str:
    """The message of the CheckpointError that ``action`` raises: one line, ended, free of terminal codes."""
    with pytest.raises(CheckpointError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert "\x1b" not in message
    assert message.endswith(".")
    return message


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


class Hostile:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_round_trip(tmp_path: Path) -> None:
    folder = saved(tmp_path, update=12, seed=1)
    assert folder == tmp_path / "step-00000012"
    assert sorted(os.listdir(tmp_path)) == ["step-00000012"]
    assert sorted(os.listdir(folder)) == sorted(checkpoint.FILES)
    model, expected = gpt(seed=2), gpt(seed=1)
    weight = model.embedding.weight
    checkpoint.load_model(folder, model)
    assert model.embedding.weight is model.head.weight is weight
    assert all(torch.equal(t, expected.state_dict()[name]) for name, t in model.state_dict().items())
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert len({"embedding.weight", "head.weight"} & set(file.keys())) == 1  # a tied tensor is written once
    state = checkpoint.load_state(folder)
    assert state["update"] == 7
    assert torch.equal(state["optimizer"][0], torch.arange(5000.0))
    assert checkpoint.load_config(folder) == {"train": {"seed": 1}}


def test_weights_are_rounded_to_the_dtype_of_the_model(tmp_path: Path) -> None:
    model = gpt(seed=2).to(torch.bfloat16)
    checkpoint.load_model(saved(tmp_path, seed=1), model)
    assert torch.equal(model.embedding.weight, gpt(seed=1).embedding.weight.to(torch.bfloat16))


def test_saving_again_replaces_the_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path, seed=1)
    folder = saved(tmp_path, seed=2)
    assert sorted(os.listdir(tmp_path)) == ["step-00000001"]
    assert checkpoint.load_config(folder) == {"train": {"seed": 2}}


@pytest.mark.parametrize("target", ["os.fsync", "torch.save", "safetensors.torch.save_model", "pathlib.Path.rename"])
@pytest.mark.parametrize("update", [1, 2], ids=["same-step", "next-step"])
def test_a_failed_write_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, update: int
) -> None:
    previous = saved(tmp_path, update=1, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(target, full_disk)
        message = sentence_of(lambda: saved(tmp_path, update=update, seed=2))
    assert "could not be written" in message
    assert "No space left on device" in message
    assert checkpoint.find(True, tmp_path) == previous
    assert checkpoint.load_config(previous) == {"train": {"seed": 1}}
    assert sorted(os.listdir(tmp_path)) == ["step-00000001"]


@pytest.mark.parametrize("room", [1000, 12000], ids=["in-the-weights", "in-the-state"])
def test_a_disk_that_is_really_full(tmp_path: Path, room: int) -> None:
    """As above with the kernel's own error, which safetensors and torch.save report in exceptions of their own."""
    resource = pytest.importorskip("resource", reason="limits on the size of files are Unix's")
    previous = saved(tmp_path, update=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        message = sentence_of(lambda: saved(tmp_path, update=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "could not be written" in message
    assert sorted(os.listdir(tmp_path)) == [previous.name]


def test_a_run_killed_while_saving_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    previous = saved(tmp_path, update=1)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            saved(tmp_path, update=2)
    assert checkpoint.find("auto", tmp_path) == previous
    assert saved(tmp_path, update=2, seed=3) == checkpoint.find(True, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000002"]


def test_a_run_killed_while_replacing_a_checkpoint_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, calls = Path.rename, []

    def killed_in_between(path: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return rename(path, target)

    previous = saved(tmp_path, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed_in_between)
        with pytest.raises(KeyboardInterrupt):
            saved(tmp_path, seed=2)
    assert checkpoint.find(True, tmp_path) == previous
    assert checkpoint.load_config(previous) == {"train": {"seed": 1}}


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -5], ids=str)
@pytest.mark.parametrize(("name", "problem"), [("model.safetensors", "is damaged ("), ("state.pt", "cannot be read (")])
def test_a_truncated_file(tmp_path: Path, name: str, problem: str, kept: float) -> None:
    folder = saved(tmp_path)
    path = folder / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2 if kept == 0.5 else int(kept)])
    load = checkpoint.load_state if name == "state.pt" else lambda folder: checkpoint.load_model(folder, gpt())
    message = sentence_of(lambda: load(folder))
    assert message.startswith(f"{path} {problem}")
    assert message.endswith("resume from an earlier checkpoint.")


@pytest.mark.parametrize("way", ["torch.save", "pickle"])
def test_a_hostile_state_runs_no_code(tmp_path: Path, way: str) -> None:
    folder, trace = saved(tmp_path), tmp_path / "trace"
    path = folder / "state.pt"
    payload = {"update": 1, "optimizer": Hostile(trace)}
    if way == "torch.save":
        torch.save(payload, path)
    else:
        path.write_bytes(pickle.dumps(payload, protocol=2))
    message = sentence_of(lambda: checkpoint.load_state(folder))
    assert message.startswith(f"{path} cannot be read (")
    assert not trace.exists()
    assert "weights_only" not in message, "torch's advice, to switch the protection off, is passed on"
    torch.load(path, weights_only=False) if way == "torch.save" else pickle.loads(path.read_bytes())
    assert trace.exists(), "the payload was harmless, so nothing was tested"


@pytest.mark.parametrize("content", [[1, 2], {"update": 1}], ids=["list", "incomplete"])
def test_a_state_of_another_program(tmp_path: Path, content: Any) -> None:
    folder = saved(tmp_path)
    torch.save(content, folder / "state.pt")
    trainer = Trainer(gpt(), TrainConfig(accelerator="cpu", updates=9), tmp_path)
    message = sentence_of(lambda: trainer.fit([torch.ones(1, 3, dtype=torch.long)], resume=True))
    assert str(folder) in message


def test_damaged_config(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / "config.json").write_text("{")
    assert "config.json cannot be read (" in sentence_of(lambda: checkpoint.load_config(folder))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"n_embd": 16}, "model.safetensors belongs to a model of another shape: size mismatch for embedding.weight: "),
        ({"vocab_size": 17}, "the shape in current model is torch.Size([17, 8])."),
        ({"n_layer": 2}, "model.safetensors belongs to another model: it lacks ['blocks.1.attention.proj.bias', "),
        ({"bias": False}, "it lacks [] and has ['blocks.0.attention.proj.bias', "),
        ({"tie_embeddings": False}, "it lacks ['head.weight'] and has [] that this one does not. Build the model from"),
    ],
)
def test_another_model(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    folder = saved(tmp_path)
    assert sentence in sentence_of(lambda: checkpoint.load_model(folder, gpt(**changes)))


def test_find(tmp_path: Path) -> None:
    assert checkpoint.find("auto", tmp_path) is None
    assert checkpoint.find("auto", tmp_path / "missing") is None
    first, second, third = (saved(tmp_path, update) for update in (2, 10, 9))
    shutil.copytree(first, tmp_path / "step-latest")
    assert checkpoint.find(False, tmp_path) is None
    assert checkpoint.find(True, tmp_path) == second
    assert checkpoint.find("auto", tmp_path) == second
    assert checkpoint.find(first, tmp_path / "elsewhere") == first
    assert checkpoint.find(str(third), tmp_path) == third
    for name in checkpoint.FILES:  # an incomplete newest is passed over
        copy = shutil.copytree(first, tmp_path / "step-00000011")
        (copy / name).unlink()
        assert checkpoint.find(True, tmp_path) == second
        assert f"(missing: {name})" in sentence_of(lambda copy=copy: checkpoint.find(copy, tmp_path))  # type: ignore[misc]
        shutil.rmtree(copy)


def test_a_checkpoint_that_is_asked_for_and_not_there(tmp_path: Path) -> None:
    message = sentence_of(lambda: checkpoint.find(True, tmp_path))
    assert message == f"resume=True, but {tmp_path} holds no checkpoint: start with resume=False or 'auto'."
    message = sentence_of(lambda: checkpoint.find(tmp_path / "step-00000003", tmp_path))
    assert re.search(r"step-00000003 is no checkpoint .*\(missing: model.safetensors, state.pt, config.json\)", message)


def test_every_mapping_of_arguments_can_be_written() -> None:
    config = TrainConfig(optimizer_args=MappingProxyType({"lr": 0.1}))
    assert as_plain(config)["optimizer_args"] == {"lr": 0.1}
