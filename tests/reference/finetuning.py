"""What the tests of fine-tuning share: a run to start from, and runs that start from it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reference.config import GPTConfig, TrainConfig
from reference.finetuning import FinetuneConfig
from reference.training.trainer import FitResult, Trainer

SIZE: dict[str, Any] = {"vocab_size": 128, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 64}
SHAPES = {
    "gpt2": GPTConfig.gpt2(**SIZE),
    "llama": GPTConfig.llama(**SIZE, n_kv_head=1),
}
EIGHT_BIT: dict[str, Any] = {"optimizer": "bitsandbytes.optim.AdamW8bit"}


def batches(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 128, (2, 17), generator=generator) for _ in range(count)]


def settings(**changes: Any) -> TrainConfig:
    common: dict[str, Any] = {"updates": 4, "optimizer_args": {"lr": 1e-2}, "save_every": 2, "log_every": 1}
    return TrainConfig(**{**common, "accelerator": "cpu", "schedule": "constant", **changes})


def trained(directory: Path, config: GPTConfig, **changes: Any) -> Path:
    """The checkpoint of a run whose loss has fallen from 4.9 to about 2."""
    run = settings(**{"updates": 40, "save_every": 40, **changes})
    Trainer(config, run, directory).fit(batches())
    return directory / f"step-{run.updates:08d}"


def tune(
    base: Path | None, directory: Path, finetune: dict[str, Any], resume: Any = False, **changes: Any
) -> FitResult:
    """A run of four updates from a checkpoint's weights."""
    trainer = Trainer(None, settings(**changes), directory, finetune=FinetuneConfig(**finetune) if finetune else None)
    return trainer.fit(batches(), None, resume, base)
