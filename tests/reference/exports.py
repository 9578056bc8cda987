"""What the tests of export and import share: checkpoints to export, and changes to exported folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reference import checkpoint
from reference.config import GPTConfig, TrainConfig, as_plain
from reference.data.tokenizer import train_tokenizer
from reference.model.gpt import GPT
from reference.training.trainer import Trainer

TINY: dict[str, Any] = {"vocab_size": 300, "block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 16, "init_std": 0.2}
SHAPES = {
    "gpt2": GPTConfig.gpt2(**TINY),
    "gpt2-untied": GPTConfig.gpt2(**TINY, tie_embeddings=False, norm_eps=1e-3, intermediate_size=40, dropout=0.1),
    "gpt2-no-bias": GPTConfig.gpt2(**TINY, bias=False),
    "llama": GPTConfig.llama(**TINY),
    "llama-tied": GPTConfig.llama(**TINY, tie_embeddings=True, norm_eps=1e-3, rope_theta=500.0),
    "llama-grouped": GPTConfig.llama(**TINY, n_kv_head=2, intermediate_size=40),
    "llama-bias": GPTConfig.llama(**TINY, n_kv_head=1, bias=True, dropout=0.1),
}
every_shape = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
GROUPED = GPTConfig.llama(**TINY, n_kv_head=2)  # what most tests of a refusal start from


def saved(
    directory: Path, config: GPTConfig, dtype: torch.dtype = torch.float32, tokenizer: str | Path | None = None
) -> Path:
    """A checkpoint of a model in which no parameter is at its start, so that none can be lost unseen."""
    model = GPT(config).to(dtype)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    folder = checkpoint.step_folder(directory, 3)
    state = {"update": 3, "optimizer": {}, "optimizer_class": "-", "precision": {}, "stable_embedding": False}
    train = TrainConfig(precision="32-true" if dtype == torch.float32 else "bf16-true")
    files = {"tokenizer.json": tokenizer} if isinstance(tokenizer, Path) else {}
    name = "tokenizer.json" if files else tokenizer
    plain = {"model": as_plain(config), "train": as_plain(train), "tokenizer": name}
    checkpoint.save(folder, model, state, plain, files)
    return folder


def ids() -> Tensor:
    return torch.randint(300, (2, 32), generator=torch.Generator().manual_seed(1))


def edit(folder: Path, **changes: Any) -> None:
    """Change fields of a config.json; ``...`` removes one."""
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}), encoding="utf-8")


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a folder's model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def tokenizer_of(kind: str, directory: Path) -> str | Path:
    """``bytes``, or a tokenizer.json that was trained on a few words."""
    if kind == "bytes":
        return kind
    path = directory / "tokenizer.json"
    path.write_bytes(train_tokenizer(["def return f(x): " * 9], 290).content)
    return path


def stable_run(directory: Path) -> Path:
    """The checkpoint of two updates with bitsandbytes, a tied head and StableEmbedding."""
    config = TrainConfig(
        optimizer="bitsandbytes.optim.AdamW8bit",
        optimizer_args={"lr": 1e-2},
        stable_embedding=True,
        accelerator="cpu",
        updates=2,
        save_every=2,
    )
    Trainer(GPTConfig.gpt2(**TINY), config, directory / "run").fit([ids()])
    return checkpoint.step_folder(directory / "run", 2)
