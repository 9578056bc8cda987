"""What the tests of checkpoints share: a tiny one, and the sentence of an error."""

from pathlib import Path
from typing import Any

import torch

from reference import checkpoint
from reference.config import GPTConfig
from reference.files import SUMS, digest, format_sums
from reference.model.gpt import GPT

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


def sum_up(folder: Path) -> None:
    """Write the checksums of a folder anew, as somebody would who forged a file in it."""
    sums = {path.name: digest(path) for path in folder.iterdir() if path.name != SUMS}
    (folder / SUMS).write_bytes(format_sums(sums))


def load(folder: Path) -> None:
    """Read all of a checkpoint, as a run does that resumes."""
    checkpoint.load_config(folder)
    checkpoint.load_state(folder)
    checkpoint.load_model(folder, gpt())
