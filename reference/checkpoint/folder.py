"""Checkpoints: weights in safetensors, the rest loadable with weights_only, complete or absent, never half.

A checkpoint is a folder ``step-00000100`` with

    model.safetensors   weights and persistent buffers, whole also if they were trained in shards; a tied tensor once
    state.pt            optimizer state, progress, precision state: tensors and plain values only
    config.json         the model's configuration, if it has one, the training configuration, the tokenizer's name
    tokenizer.json      the tokenizer, if it has a file
    chat_template.jinja its chat template, if it has one
    SHA256SUMS          checksums of them all, checked on load

It appears complete or not at all (reference.files), so a run that is killed while saving leaves the previous
checkpoint as the newest. Only one run at a time may write into a directory, which holds a lock; any number may read.
"""

import json
import logging
import re
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from pickle import PicklingError
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from reference.checkpoint.weights import misfit, read_weights, write_weights
from reference.config import GPTConfig, check_saved
from reference.errors import CheckpointError, ConfigurationError, cause_of, first_line
from reference.files import (
    SUMS,
    digest,
    hidden,
    is_intact,
    new_folder,
    read_json,
    read_sums,
    recover,
    require_utf8,
    tidy,
)
from reference.finetuning.config import FinetuneConfig, saved_finetuning
from reference.finetuning.merged import merged_weights
from reference.finetuning.quantised import load_packed, without_packed
from reference.model.embedding import restore_embeddings, swap_embeddings
from reference.model.gpt import GPT
from reference.optimizers.state import misformed

logger = logging.getLogger("reference")

STEPS = "step-*"
STEP = re.compile(r"step-(\d{8,})")
WEIGHTS, PROGRESS, CONFIG = FILES = ("model.safetensors", "state.pt", "config.json")
FORMAT = 1  # in config.json since there are checksums: a checkpoint that has it must have SHA256SUMS


def step_folder(directory: Path, update: int) -> Path:
    """Return where the checkpoint after ``update`` updates lies."""
    return directory / f"step-{update:08d}"


def number(folder: Path) -> int:
    """Return the updates done at a checkpoint, from its name; 0 if it has another kind of name."""
    found = STEP.fullmatch(folder.name)
    return int(found[1]) if found else 0


def save(
    folder: Path,
    weights: nn.Module | Mapping[str, Tensor],
    state: dict[str, Any],
    config: dict[str, Any],
    files: Mapping[str, bytes | Path] = MappingProxyType({}),
) -> None:
    """Write a checkpoint folder; it appears complete or not at all.

    Args:
        folder: its name, from :func:`step_folder`. One that is there is replaced.
        weights: a module, or its state dict: whole, if it was sharded.
        state: for ``state.pt``, with the keys of ``optimizers.state.STATE``; tensors and plain values only.
        config: for ``config.json``: ``model``, ``train``, ``tokenizer``.
        files: further files, such as tokenizer.json, by name: the content, or where to copy it from.

    Raises:
        CheckpointError: if the disk does not take it, or if it could not be loaded again. Earlier checkpoints are
            untouched.
    """
    from safetensors import SafetensorError

    state_dict = weights.state_dict() if isinstance(weights, nn.Module) else weights
    plain = {"format": FORMAT, "tokenizer": None} | config
    content = {**files, CONFIG: (json.dumps(plain, indent=2, default=str) + "\n").encode()}
    require_utf8(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        tidy(folder.parent, STEPS)
        with new_folder(folder) as add:
            add(WEIGHTS, partial(write_weights, state_dict))
            add(PROGRESS, partial(write_state, state))
            for name, source in content.items():
                add(name, partial(Path.write_bytes, data=source if isinstance(source, bytes) else source.read_bytes()))
    # A full disk is the second and third to safetensors and torch. The others: what cannot be stored at all.
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError, AttributeError, PicklingError) as error:
        raise CheckpointError(
            f"the checkpoint {folder} could not be written: {cause_of(error)}. Earlier checkpoints are complete; "
            "make room or choose another directory, and resume from the newest."
        ) from error


def write_state(state: dict[str, Any], path: Path) -> None:
    """Write state.pt.

    Raises:
        ValueError: if ``weights_only`` would refuse to load it: now, not when a run is to be resumed.
    """
    with path.open("wb") as file:  # so that a full disk is an OSError of Python's
        torch.save(state, file)
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # mapped, so no tensor is read
    except Exception as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"its state holds {found[1] if found else 'an object'}, where only tensors and plain values load safely"
        ) from error


def prune(directory: Path, keep_last: int | None, newest: Path | None = None) -> list[Path]:
    """Remove the checkpoints before the last ``keep_last`` (None: keep all), and return which.

    Only complete ones count and are removed, but not a link, nor one with a file that was not written with it. A folder
    is renamed before it is emptied, so a run that is killed leaves none of them half.

    Args:
        directory: of the run.
        keep_last: how many to keep.
        newest: the one just written, which is the last. Higher numbers are of a run before, that this one went back
            behind; they are left alone. None: the one with the highest number.
    """
    found = [folder for folder in checkpoints(directory) if newest is None or number(folder) <= number(newest)]
    removed = []
    for folder in found[:-keep_last] if keep_last is not None else []:
        foreign = {path.name for path in folder.iterdir()} - {*FILES, SUMS, *(read_sums(folder) or {})}
        if foreign or folder.is_symlink():
            logger.info("checkpoint: %s is kept, because of %s", folder, ", ".join(sorted(foreign)) or "its link")
            continue
        try:
            folder.rename(hidden(folder, "removed"))
        except OSError as error:  # no reason to end a run
            logger.warning("checkpoint: %s cannot be removed: %s", folder, error.strerror)
            continue
        shutil.rmtree(hidden(folder, "removed"), ignore_errors=True)
        removed.append(folder)
    return removed


def lacking(folder: Path) -> list[str]:
    """Return the files of a checkpoint that are not there."""
    return [name for name in dict.fromkeys((*FILES, *(read_sums(folder) or {}))) if not (folder / name).is_file()]


def is_complete(folder: Path) -> bool:
    """Return whether all files of a checkpoint are there."""
    return not lacking(folder)


def checkpoints(directory: Path) -> list[Path]:
    """Return the complete checkpoints in ``directory``, by number."""
    found = [path for path in directory.glob("step-*") if STEP.fullmatch(path.name) and is_complete(path)]
    return sorted(found, key=number)


def find(resume: bool | Literal["auto"] | str | Path, directory: Path) -> Path | None:
    """Return the checkpoint folder to resume from, or None for a fresh start.

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
    if resume is True or resume == "auto":
        recover(directory, STEPS)
        found = checkpoints(directory)
        for folder in directory.glob("step-*"):
            if STEP.fullmatch(folder.name) and folder not in found:
                logger.warning("resume: %s is passed over, because it lacks %s", folder, ", ".join(lacking(folder)))
        if found:
            return found[-1]
        if resume == "auto":
            return None
        raise CheckpointError(f"resume=True, but {directory} holds no checkpoint: start with resume=False or 'auto'.")
    if not isinstance(resume, str | Path):
        raise CheckpointError(f"resume is {resume!r}: give False, True, 'auto' or the folder of a checkpoint.")
    folder = Path(resume)
    if lacking(folder):
        recover(folder.parent, STEPS)
    if not is_complete(folder):
        raise CheckpointError(
            f"{folder} is not a checkpoint of this trainer (missing: {', '.join(lacking(folder))}): give a folder like "
            f"{step_folder(directory, 100)}, or resume=False for a fresh start."
        )
    return folder


def verify(folder: Path, name: str) -> None:
    """Check that a file of a checkpoint is the one that was written with it.

    Raises:
        CheckpointError: if it is damaged, missing or that of another checkpoint.
    """
    require_utf8(folder)
    sums = read_sums(folder)
    try:
        if sums is None and b'"format"' in (folder / CONFIG).read_bytes():
            raise damaged(folder / SUMS, "is missing")
        if sums is None:
            logger.info("checkpoint: %s is not checked, because it was written without checksums", folder / name)
        elif sums.get(name) != digest(folder / name):
            raise damaged(folder / name, f"is damaged (its checksum is not the one in {SUMS})")
    except OSError as error:
        raise damaged(folder / name, f"cannot be read ({error.strerror})") from error


def damaged(path: Path, problem: str) -> CheckpointError:
    """Return the error for a file of a checkpoint, which names the newest intact checkpoint before that one."""
    before = [folder for folder in checkpoints(path.parent.parent) if number(folder) < number(path.parent)]
    intact = next((folder for folder in reversed(before) if is_intact(folder)), None)
    advice = "no earlier checkpoint beside it is intact" if intact is None else f"resume from {intact} instead"
    return CheckpointError(f"{path} {problem}: {advice}.")


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Return the whole weights of a checkpoint on the CPU, mapped from the file; tied names share one tensor.

    Raises:
        CheckpointError: if the file is damaged.
    """
    from safetensors import SafetensorError

    verify(folder, WEIGHTS)
    try:
        return read_weights(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise damaged(folder / WEIGHTS, f"is damaged ({first_line(error)})") from error


def load_model(folder: Path, model: nn.Module) -> None:
    """Load the weights of a checkpoint into ``model``, in place, rounded to its dtype.

    Raises:
        CheckpointError: if the file is damaged or of a model with other tensors. The model is untouched then.
    """
    put_into(model, load_weights(folder), folder / WEIGHTS)


def put_into(model: nn.Module, saved: dict[str, Tensor], path: Path) -> None:
    """Load weights that were read from ``path``, or raise CheckpointError if they do not fit."""
    own = model.state_dict()
    # Of scales and codes beside quantised weights only the names must agree: their sizes depend on the weights.
    kept, wanted = (saved, own) if saved.keys() != own.keys() else (without_packed(saved), without_packed(own))
    if problem := misfit(kept, wanted):
        raise CheckpointError(f"{path} belongs to {problem}. Build the model from the config.json beside it.")
    casts = {f"{kept[n].dtype} as {wanted[n].dtype}" for n in wanted if kept[n].dtype != wanted[n].dtype}
    if casts:
        logger.warning("checkpoint: %s is loaded in another dtype: %s", path, ", ".join(sorted(casts)))
    model.load_state_dict(kept)
    try:
        load_packed(model, saved)
    except ConfigurationError as error:
        raise CheckpointError(f"{path} cannot be used: {first_line(error)}.") from error


def load_state(folder: Path) -> dict[str, Any]:
    """Load optimizer state and progress, onto the CPU, and return them.

    Raises:
        CheckpointError: if the file is damaged or holds anything but tensors and plain values.
    """
    path = folder / PROGRESS
    verify(folder, PROGRESS)
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the zip reader and the unpickler raise
        # Without torch's own words: they advise to switch the protection against hostile files off.
        raise damaged(path, "cannot be read (damaged, or more than tensors and values)") from error
    if problem := misformed(state):
        raise CheckpointError(f"{path} was not written by this trainer: {problem}.")
    return state


def load_config(folder: Path) -> dict[str, Any]:
    """Return what config.json says: ``model`` (of a reference.GPT), ``train`` and ``tokenizer``.

    Raises:
        CheckpointError: if the file is damaged.
    """
    path = folder / CONFIG
    verify(folder, CONFIG)
    try:
        config = {"tokenizer": None, "train": {}} | read_json(path)
        check_saved(config)
    except (OSError, ValueError) as error:
        raise damaged(path, f"cannot be read ({first_line(error)})") from error
    return config


def load_finetuning(folder: Path) -> FinetuneConfig:
    """Return how the run of a checkpoint fine-tuned; the defaults where it did not.

    Raises:
        CheckpointError: if config.json is damaged.
    """
    try:
        return saved_finetuning(load_config(folder))
    except ConfigurationError as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be used: {first_line(error).rstrip('.')}.") from error


def load_for_inference(folder: str | Path) -> GPT:
    """Return the GPT of a checkpoint, in eval mode on the CPU, with plain embeddings and one weight per layer.

    What was fine-tuned beside frozen weights is merged into them, in float32.

    Raises:
        CheckpointError: if the checkpoint is missing, damaged, or of a module that is not a reference.GPT.
    """
    path = find(Path(folder), Path(folder).parent)
    assert path is not None
    config = load_config(path)
    if "model" not in config:
        raise CheckpointError(f"{path} holds a module that is not reference.GPT: build it yourself and use load_model.")
    try:
        model: nn.Module = GPT(GPTConfig(**config["model"]))
    except (ConfigurationError, TypeError) as error:
        problem = first_line(error).rstrip(".")
        raise CheckpointError(f"{path / CONFIG} does not describe a model of this version: {problem}.") from error
    finetune = load_finetuning(path)
    if config["train"].get("precision") == "bf16-true" and finetune.lora_rank is None:
        model.to(torch.bfloat16)
    try:
        saved = merged_weights(load_weights(path), finetune)
    except ConfigurationError as error:
        raise CheckpointError(f"{path / WEIGHTS} does not hold what {CONFIG} says: {first_line(error)}.") from error
    if "embedding.norm.weight" in saved:  # state.pt says it too, but is twice as large as the weights
        swap_embeddings(model)
    put_into(model, saved, path / WEIGHTS)
    restored = restore_embeddings(model)
    assert isinstance(restored, GPT)
    return restored
