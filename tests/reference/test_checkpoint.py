"""Checkpoints: what is written, and that it comes back; which is found; what is removed; models that do not fit."""

import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_model
from torch import Tensor, nn

from reference import checkpoint
from reference.checkpoint.folder import FILES, number
from reference.checkpoint.weights import first_names
from reference.config import GPTConfig, TrainConfig, as_plain
from reference.errors import CheckpointError
from reference.files import hidden, lock
from reference.training.trainer import FitResult, Record, Trainer
from tests.reference.checkpoints import STATE, TINY, gpt, load, saved
from tests.sentences import sentence_of

WHOLE = sorted([*FILES, "SHA256SUMS"])


def names_in(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return list(file.keys())


# what is written and comes back ----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["module", "state dict"])
def test_round_trip(tmp_path: Path, way: str) -> None:
    folder, source = checkpoint.step_folder(tmp_path, 12), gpt(seed=1)
    weights = source if way == "module" else source.state_dict()
    checkpoint.save(folder, weights, STATE, {"train": {"seed": 1}})
    assert folder == tmp_path / "step-00000012"
    assert os.listdir(tmp_path) == ["step-00000012"]
    assert sorted(os.listdir(folder)) == WHOLE
    model, expected = gpt(seed=2), gpt(seed=1).state_dict()
    weight = model.embedding.weight
    checkpoint.load_model(folder, model)
    assert model.embedding.weight is model.head.weight is weight
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    state = checkpoint.load_state(folder)
    assert state["update"] == 7
    assert torch.equal(state["optimizer"][0], torch.arange(5000.0))
    assert checkpoint.load_config(folder) == {"format": 1, "tokenizer": None, "train": {"seed": 1}}
    # A tied tensor is written once, and comes back as one under both names.
    assert len({"embedding.weight", "head.weight"} & set(names_in(folder))) == 1
    tensors = checkpoint.load_weights(folder)
    assert tensors.keys() == expected.keys()
    assert tensors["head.weight"] is tensors["embedding.weight"]


def test_checksums_are_those_of_sha256sum(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    expected = {f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}" for name in FILES}
    assert set((folder / "SHA256SUMS").read_text().splitlines()) == expected


@pytest.mark.parametrize("way", ["content", "path"])
def test_the_tokenizer_is_kept_beside_the_weights(tmp_path: Path, way: str) -> None:
    source = tmp_path / "somewhere.json"
    source.write_bytes(b"{}")
    folder = checkpoint.step_folder(tmp_path, 1)
    files: dict[str, bytes | Path] = {"tokenizer.json": b"{}" if way == "content" else source}
    checkpoint.save(folder, gpt(), STATE, {"train": {}, "tokenizer": "tokenizer.json"}, files)
    assert (folder / "tokenizer.json").read_bytes() == b"{}"
    assert checkpoint.load_config(folder)["tokenizer"] == "tokenizer.json"
    (folder / "tokenizer.json").unlink()
    assert "(missing: tokenizer.json)" in sentence_of(CheckpointError, lambda: checkpoint.find(folder, tmp_path))


def test_a_checkpoint_of_the_first_release_loads(tmp_path: Path) -> None:
    """Without checksums, without a tokenizer, and with the weights written by safetensors' own save_model."""
    folder = tmp_path / "step-00000003"
    folder.mkdir()
    save_model(gpt(seed=5), str(folder / "model.safetensors"))
    torch.save(STATE, folder / "state.pt")
    (folder / "config.json").write_text(json.dumps({"train": {}}))
    assert checkpoint.find(True, tmp_path) == folder
    model = gpt()
    checkpoint.load_model(folder, model)
    assert torch.equal(model.head.weight, gpt(seed=5).head.weight)
    assert checkpoint.load_state(folder)["update"] == 7
    assert checkpoint.load_config(folder) == {"train": {}, "tokenizer": None}


class Overlapping(nn.Module):
    """Buffers that share memory in ways that safetensors refuses; empty ones, which share none."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.arange(6.0)
        for name, tensor in {
            "whole": whole,
            "part": whole[3:],
            "turned": whole.view(2, 3).T,
            "same": whole,
            "nothing": torch.empty(0),
            "none": torch.empty(0),
        }.items():
            self.register_buffer(name, tensor)


def test_tensors_that_overlap(tmp_path: Path) -> None:
    folder, model, expected = tmp_path / "step-00000001", Overlapping(), Overlapping().state_dict()
    checkpoint.save(folder, model, STATE, {})
    assert names_in(folder) == ["none", "nothing", "part", "same", "turned"]
    tensors = checkpoint.load_weights(folder)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    for tensor in model.buffers():
        tensor.zero_()
    checkpoint.load_model(folder, model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_names_of_one_tensor() -> None:
    names = first_names(gpt().state_dict())
    assert {name: first for name, first in names.items() if name != first} == {"head.weight": "embedding.weight"}
    meta = torch.empty(2, device="meta")
    assert first_names({"a": meta, "b": torch.empty(2, device="meta")}) == {"a": "a", "b": "b"}


def test_weights_are_rounded_to_the_dtype_of_the_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved(tmp_path, seed=1)
    checkpoint.load_model(folder, gpt())
    assert not caplog.records
    checkpoint.load_model(folder, model := gpt(seed=2).to(torch.bfloat16))
    assert torch.equal(model.embedding.weight, gpt(seed=1).embedding.weight.to(torch.bfloat16))
    assert caplog.messages == [
        f"checkpoint: {folder / 'model.safetensors'} is loaded in another dtype: torch.float32 as torch.bfloat16"
    ]


def test_every_mapping_of_arguments_can_be_written() -> None:
    config = TrainConfig(optimizer_args=MappingProxyType({"lr": 0.1}))
    assert as_plain(config)["optimizer_args"] == {"lr": 0.1}


# models that do not fit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"vocab_size": 17}, "a model of another shape: embedding.weight is (16, 8) there and (17, 8) here."),
        (
            {"n_embd": 16},
            "a model of another shape: embedding.weight is (16, 8) there and (16, 16) here, position.weight is (8, 8) "
            "there and (8, 16) here, blocks.0.norm_attention.weight is (8,) there and (16,) here and 13 more.",
        ),
        ({"n_layer": 2}, "another model: it lacks blocks.1.attention.proj.bias, blocks.1.attention.proj.weight, block"),
        (
            {"bias": False},
            "another model: it lacks nothing, and has blocks.0.attention.proj.bias, blocks.0.attention.q",
        ),
        ({"tie_embeddings": False}, "another model: head.weight is tied to embedding.weight there, and a tensor of i"),
    ],
)
def test_another_model(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    folder, model, before = saved(tmp_path), gpt(2, **changes), gpt(2, **changes).state_dict()
    message = sentence_of(CheckpointError, lambda: checkpoint.load_model(folder, model))
    assert message.startswith(f"{folder / 'model.safetensors'} belongs to {sentence}")
    assert message.endswith(". Build the model from the config.json beside it.")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "half loaded"


def test_a_head_that_is_tied_only_here(tmp_path: Path) -> None:
    folder, untied = tmp_path / "step-00000001", gpt(tie_embeddings=False)
    checkpoint.save(folder, untied, STATE, {})
    message = sentence_of(CheckpointError, lambda: checkpoint.load_model(folder, gpt()))
    assert "head.weight is a tensor of its own there, and tied to embedding.weight here" in message
    # Gathered from shards, tied tensors come as two that are equal.
    untied.head.weight.data.copy_(untied.embedding.weight)
    checkpoint.save(folder, untied, STATE, {})
    checkpoint.load_model(folder, model := gpt(seed=2))
    assert torch.equal(model.head.weight, untied.head.weight)
    assert model.head.weight is model.embedding.weight


# which one is found ----------------------------------------------------------------------------------------------


def test_find(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert checkpoint.find("auto", tmp_path) is None
    assert checkpoint.find("auto", tmp_path / "missing") is None
    first, second, third = (saved(tmp_path, update) for update in (2, 10, 9))
    shutil.copytree(first, tmp_path / "step-latest")
    assert checkpoint.find(False, tmp_path) is None
    assert checkpoint.find(True, tmp_path) == second
    assert checkpoint.find("auto", tmp_path) == second
    assert checkpoint.find(first, tmp_path / "elsewhere") == first
    assert checkpoint.find(str(third), tmp_path) == third
    assert not caplog.records
    for name in FILES:  # an incomplete newest is passed over, and it is said
        copy = shutil.copytree(first, tmp_path / "step-00000011")
        (copy / name).unlink()
        assert checkpoint.find(True, tmp_path) == second
        assert caplog.messages == [f"resume: {copy} is passed over, because it lacks {name}"]
        assert f"(missing: {name})" in sentence_of(CheckpointError, lambda copy=copy: checkpoint.find(copy, tmp_path))  # type: ignore[misc] # a default
        shutil.rmtree(copy)
        caplog.clear()


def test_numbers_of_nine_digits_come_last(tmp_path: Path) -> None:
    last = saved(tmp_path, 100_000_000)
    saved(tmp_path, 99_999_999)
    assert checkpoint.find(True, tmp_path) == last


def test_a_checkpoint_that_is_asked_for_and_not_there(tmp_path: Path) -> None:
    message = sentence_of(CheckpointError, lambda: checkpoint.find(True, tmp_path))
    assert message == f"resume=True, but {tmp_path} holds no checkpoint: start with resume=False or 'auto'."
    message = sentence_of(CheckpointError, lambda: checkpoint.find(tmp_path / "step-00000003", tmp_path))
    assert re.search(r"-00000003 is not a checkpoint .*\(missing: model.safetensors, state.pt, config.json\)", message)


# what is removed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep_last", "left"), [(None, [1, 2, 5, 9]), (4, [1, 2, 5, 9]), (2, [5, 9]), (1, [9]), (9, [1, 2, 5, 9])], ids=str
)
def test_prune_keeps_the_last(tmp_path: Path, keep_last: int | None, left: list[int]) -> None:
    folders = {update: saved(tmp_path, update) for update in (9, 1, 2, 5)}
    removed = checkpoint.prune(tmp_path, keep_last)
    assert removed == [folders[update] for update in (1, 2, 5, 9) if update not in left]
    assert sorted(os.listdir(tmp_path)) == [folders[update].name for update in left]


def test_prune_leaves_what_is_not_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with_notes, incomplete, other, linked, ours, newest = (saved(tmp_path, update) for update in (1, 2, 3, 4, 5, 6))
    (with_notes / "notes.txt").write_text("best so far")
    (incomplete / "state.pt").unlink()
    other = other.rename(tmp_path / "best")
    elsewhere = linked.rename(tmp_path / "elsewhere")
    linked.symlink_to(elsewhere)
    (tmp_path / "step-00000007").write_text("a file")
    assert checkpoint.prune(tmp_path, 1) == [ours]
    left = [with_notes, incomplete, other, linked, elsewhere, newest, tmp_path / "step-00000007"]
    assert sorted(tmp_path.iterdir()) == sorted(left)
    assert caplog.messages == [
        f"checkpoint: {with_notes} is kept, because of notes.txt",
        f"checkpoint: {linked} is kept, because of its link",
    ]


def test_a_run_that_went_back_keeps_what_it_writes(tmp_path: Path) -> None:
    """It resumed from update 1, beside checkpoints of the updates 8 and 9 of the run before."""
    folders = {update: saved(tmp_path, update) for update in (1, 8, 9, 2)}
    assert checkpoint.prune(tmp_path, 1, newest=folders[2]) == [folders[1]]
    assert checkpoint.checkpoints(tmp_path) == [folders[2], folders[8], folders[9]]


def test_a_checkpoint_that_cannot_be_removed_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = saved(tmp_path, 1), saved(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
        assert checkpoint.prune(tmp_path, 1) == []
    assert checkpoint.checkpoints(tmp_path) == [first, second]
    assert caplog.messages == [f"checkpoint: {first} cannot be removed: Permission denied"]


def test_what_killed_runs_left_goes_when_the_next_one_writes(tmp_path: Path) -> None:
    kept, aside, other = saved(tmp_path, 1), saved(tmp_path, 2), saved(tmp_path, 3)
    shutil.copytree(kept, hidden(kept, "previous"))  # killed when the new one was in its place
    aside.rename(hidden(aside, "previous"))  # killed before
    other.rename(hidden(other, "removed"))
    shutil.copytree(kept, tmp_path / ".step-00000008.partial")
    for name in (".step-mine", ".steps.partial", ".git"):
        (tmp_path / name).mkdir()
    before = sorted(os.listdir(tmp_path))
    checkpoint.find(kept, tmp_path)  # reading a checkpoint changes nothing: a run may be writing there
    assert sorted(os.listdir(tmp_path)) == before
    assert checkpoint.find("auto", tmp_path) == aside
    saved(tmp_path, 9)
    expected = [".git", ".step-mine", ".steps.partial", "step-00000001", "step-00000002", "step-00000009"]
    assert sorted(os.listdir(tmp_path)) == expected
    load(aside)


# two runs in one directory


def test_a_second_run_in_one_directory_is_refused_and_neither_is_damaged(
    tmp_path: Path, batches: list[Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    def second(record: Record) -> None:
        if record.update in (1, 3):  # before and after the first checkpoint
            for save_every in (None, 1):
                message = sentence_of(CheckpointError, lambda s=save_every: run(s, "auto"))  # type: ignore[misc] # a default
                assert message.startswith(f"another run is writing to {tmp_path}: wait until it has ended, or")
            seen.append(record.update)

    def run(save_every: int | None, resume: Any, *callbacks: Any, updates: int = 4) -> FitResult:
        config = TrainConfig(updates=updates, accelerator="cpu", save_every=save_every)
        return Trainer(GPTConfig.gpt2(**TINY), config, tmp_path, callbacks).fit(batches, resume=resume)

    seen: list[int] = []
    first = run(2, False, second)
    assert seen == [1, 3]
    assert [number(folder) for folder in checkpoint.checkpoints(tmp_path)] == [2, 4]
    assert len(first.records) == 4
    assert len(run(2, "auto", updates=5).records) == 1  # the lock ended with the run
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-0000000{n}" for n in (2, 4, 5)]


def test_who_only_looks_puts_nothing_back_under_a_run(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1)
    folder.rename(hidden(folder, "previous"))  # as a run does for a moment when it replaces a checkpoint
    with lock(tmp_path) as alone:
        assert alone
        assert checkpoint.find("auto", tmp_path) is None
    assert checkpoint.find("auto", tmp_path) == folder


def test_where_there_is_no_lock_there_is_no_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with lock(tmp_path / "absent") as alone:
        assert alone
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    with lock(tmp_path) as first, lock(tmp_path) as second:
        assert first
        assert second
