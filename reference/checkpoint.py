"""Checkpoints: weights in safetensors, the rest loadable with weights_only, complete or absent, never half.

A checkpoint is a folder ``step-00000100`` with

    model.safetensors   weights and persistent buffers; a tied tensor once
    state.pt            optimizer state, progress, precision state: tensors and plain values only
    config.json         the model's configuration, if it has one, and the training configuration

It is written under another name, flushed to the disk and then renamed, so a run that is killed while saving leaves
the previous checkpoint as the newest.
"""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from reference.config import GPTConfig
from reference.embedding import restore_embeddings, swap_embeddings
from reference.model import GPT

STEP = re.compile(r"step-(\d{8})")
STATE = {"update", "optimizer", "optimizer_class", "precision", "stable_embedding"}  # what state.pt holds
FILES = ("model.safetensors", "state.pt", "config.json")


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, incomplete, damaged or of another model. The message says which and what to do."""


def step_folder(directory: Path, update: int) -> Path:
    """Where the checkpoint after ``update`` updates lies."""
    return directory / f"step-{update:08d}"


def save(folder: Path, model: nn.Module, state: dict[str, Any], config: dict[str, Any]) -> None:
    """Write a checkpoint folder; it appears complete or not at all.

    Raises:
        CheckpointError: if the disk does not take it. Earlier checkpoints are untouched.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_model

    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_model(model, str(partial / "model.safetensors"))
        torch.save(state, partial / "state.pt")
        (partial / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            flush(path)
        replace_folder(partial, folder)
    except (OSError, SafetensorError, RuntimeError) as error:  # a full disk is the last two to safetensors and torch
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint {folder} could not be written: {first_line(error)}. Earlier checkpoints are complete; "
            "make room or choose another directory, and resume from the newest."
        ) from error


def replace_folder(new: Path, folder: Path) -> None:
    """Give ``new`` the name ``folder``. One that is there (of a run that this one resumes) goes when that is done."""
    previous = folder.with_name(f".{folder.name}.previous")
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
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
        folder = directory / previous.name.removeprefix(".").removesuffix(".previous")
        if not folder.exists():
            with contextlib.suppress(OSError):  # another rank was quicker, or the folder is only to be read
                previous.rename(folder)


def flush(path: Path) -> None:
    """Force a file's content, or a folder's entries, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find(resume: bool | Literal["auto"] | str | Path, directory: Path) -> Path | None:
    """The checkpoint folder to resume from, or None for a fresh start.

    Args:
        resume: False: none. True: the newest in ``directory``. ``auto``: the newest, or None if there is none.
            A path: that checkpoint.
        directory: where the run keeps its checkpoints.

    Raises:
        CheckpointError: if the one asked for is not there. Starting from random weights instead would look like
            success (torchtitan#1311).
    """
    if resume is False:
        return None
    recover(directory)
    if resume is True or resume == "auto":
        found = [path for path in directory.glob("step-*") if STEP.fullmatch(path.name) and is_complete(path)]
        if found:
            return max(found, key=lambda path: path.name)
        if resume == "auto":
            return None
        raise CheckpointError(f"resume=True, but {directory} holds no checkpoint: start with resume=False or 'auto'.")
    folder = Path(resume)
    if not is_complete(folder):
        missing = ", ".join(name for name in FILES if not (folder / name).is_file())
        raise CheckpointError(
            f"{folder} is no checkpoint of this trainer (missing: {missing}): give a folder like "
            f"{step_folder(directory, 100)}, or resume=False for a fresh start."
        )
    return folder


def is_complete(folder: Path) -> bool:
    """Whether all files of a checkpoint are there."""
    return all((folder / name).is_file() for name in FILES)


def load_model(folder: Path, model: nn.Module) -> None:
    """Load the weights of a checkpoint into ``model``, in place.

    Raises:
        CheckpointError: if the file is damaged or belongs to a model of another shape.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model as load_safetensors

    path = folder / "model.safetensors"
    try:
        missing, unexpected = load_safetensors(model, str(path), strict=False)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): resume from an earlier checkpoint.") from error
    except RuntimeError as error:  # load_state_dict reports sizes that do not match like this
        raise CheckpointError(f"{path} belongs to a model of another shape: {first_line(error)}") from error
    if missing or unexpected:
        raise CheckpointError(
            f"{path} belongs to another model: it lacks {sorted(missing)[:3]} and has {sorted(unexpected)[:3]} "
            "that this one does not. Build the model from the config.json beside it."
        )


def load_state(folder: Path) -> dict[str, Any]:
    """Load optimizer state and progress.

    Raises:
        CheckpointError: if the file is damaged or holds anything but tensors and plain values.
    """
    path = folder / "state.pt"
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the zip reader and the unpickler raise
        # Without torch's own words: they advise to switch the protection against hostile files off.
        raise CheckpointError(
            f"{path} cannot be read (damaged, or more than tensors and values): resume from an earlier checkpoint."
        ) from error
    if not isinstance(state, dict) or not STATE.issubset(state):
        raise CheckpointError(f"{path} was not written by this trainer: it lacks some of {', '.join(sorted(STATE))}.")
    return state


def load_config(folder: Path) -> dict[str, Any]:
    """Load the configurations that were written beside the weights.

    Raises:
        CheckpointError: if the file is damaged.
    """
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): resume from an earlier checkpoint.") from error
    return config


def load_for_inference(folder: str | Path) -> nn.Module:
    """The GPT of a checkpoint, in eval mode on the CPU, with plain embeddings.

    Raises:
        CheckpointError: if the checkpoint is missing, damaged, or of a module that is no GPT of ours.
    """
    path = find(Path(folder), Path(folder).parent)
    assert path is not None
    config = load_config(path)
    if "model" not in config:
        raise CheckpointError(f"{path} holds a module that is not reference.GPT: build it yourself and use load_model.")
    state = load_state(path)
    model: nn.Module = GPT(GPTConfig(**config["model"]))
    if config["train"]["precision"] == "bf16-true":
        model.to(torch.bfloat16)
    if state["stable_embedding"]:
        swap_embeddings(model)
    load_model(path, model)
    return restore_embeddings(model)


def first_line(error: Exception) -> str:
    """The first line that says something, of a message that may have many."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.startswith("Error(s) in loading")), type(error).__name__)
