"""Named runs: shape, training settings and data together, each of which the command line may change."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reference.config import DataConfig, GPTConfig, TrainConfig
from reference.errors import ConfigurationError


@dataclass(frozen=True)
class Preset:
    """A run by name."""

    about: str
    """One sentence for the help text."""
    model: GPTConfig
    train: TrainConfig
    data: DataConfig


def adamw(lr: float, weight_decay: float = 0.1) -> dict[str, Any]:
    """Return AdamW's arguments for GPT-3 (https://arxiv.org/abs/2005.14165, appendix B), but with PyTorch's eps."""
    return {"lr": lr, "betas": [0.9, 0.95], "weight_decay": weight_decay}


def pretraining(lr: float, microbatches: int, warmup: int, updates: int) -> TrainConfig:
    """Return the settings that the large presets share. One GPU: on N of them, divide ``microbatches`` by N.

    The rates and the tokens per update are those of the GPT-3 model of the nearest size
    (https://arxiv.org/abs/2005.14165, table 2.1), the warm-up is its 375 million tokens, and the cosine ends at a
    tenth of the peak. The length is some 20 tokens per parameter (https://arxiv.org/abs/2203.15556).
    """
    return TrainConfig(
        updates=updates,
        microbatches=microbatches,
        optimizer_args=adamw(lr),
        warmup=warmup,
        clip=1.0,
        precision="bf16-mixed",
        compile=True,
        evaluate_every=250,
        evaluate_batches=20,
        save_every=1000,
        keep_last=2,
    )


PRESETS = {
    "tiny": Preset(
        "a Llama of 0.8 million parameters over bytes, for a minute on two CPU cores",
        # Llama's shape: it learns faster than GPT-2's, to 1.47 nats per byte instead of 1.84 in these 600 updates.
        # 257 is the byte vocabulary as it is. Padding it to a multiple of 64 would pay on tensor cores only.
        GPTConfig.llama(vocab_size=257, block_size=128, n_layer=4, n_head=4, n_embd=128, tie_embeddings=True),
        TrainConfig(
            updates=600,
            optimizer_args=adamw(3e-3),
            warmup=20,
            evaluate_every=100,
            evaluate_batches=20,
            save_every=200,
            keep_last=2,
        ),
        DataConfig(microbatch_size=16),
    ),
    "gpt2-124m": Preset(
        "GPT-2 small: 12 layers of 768, 0.5 million tokens per update",
        GPTConfig.gpt2(fp32_residual=False),
        pretraining(lr=6e-4, microbatches=8, warmup=715, updates=4800),
        DataConfig(microbatch_size=64),
    ),
    "gpt2-350m": Preset(
        "GPT-2 medium: 24 layers of 1024, 0.5 million tokens per update",
        GPTConfig.gpt2(n_layer=24, n_head=16, n_embd=1024, fp32_residual=False),
        pretraining(lr=3e-4, microbatches=16, warmup=715, updates=13_500),
        DataConfig(microbatch_size=32),
    ),
    "gpt2-1.5b": Preset(
        "GPT-2 XL: 48 layers of 1600, 1 million tokens per update",
        GPTConfig.gpt2(n_layer=48, n_head=25, n_embd=1600, fp32_residual=False),
        pretraining(lr=2e-4, microbatches=128, warmup=358, updates=30_000),
        DataConfig(microbatch_size=8),
    ),
    "llama-1.2b": Preset(
        "Llama's shape: 24 layers of 2048, 1 million tokens per update",
        GPTConfig.llama(fp32_residual=False),
        pretraining(lr=2e-4, microbatches=64, warmup=358, updates=26_000),
        DataConfig(microbatch_size=8),
    ),
}


TUNED = 2e-5  # AdamW's peak rate for trained weights
MUON_BESIDE_ADAMW = 10  # times AdamW's rate


def tuning_rate(optimizer: str, arguments: Mapping[str, Any]) -> float | None:
    """Return a rate at which an optimizer tunes trained weights; None for one whose rates are not known here."""
    name = optimizer.rpartition(".")[2].lower()
    if name == "muon":
        return TUNED * (1 if arguments.get("adjust_lr_fn") == "match_rms_adamw" else MUON_BESIDE_ADAMW)
    return TUNED if "adam" in name else None


def fine_tuning(model: GPTConfig, folder: str) -> Preset:
    """Return the run that goes on from imported weights, at rates that do not destroy what they know.

    No warm-up, so that a run of any length works: at a hundredth of the rate of pretraining, a first step of AdamW
    moves each weight by 2e-5 at most. ``keep_last`` is left out, which would remove the imported weights.

    Args:
        model: the imported shape.
        folder: of the data.
    """
    train = TrainConfig(
        updates=500,
        optimizer_args=adamw(TUNED, weight_decay=0.01),
        warmup=0,
        clip=1.0,
        evaluate_every=50,
        evaluate_batches=20,
        save_every=100,
    )
    return Preset("fine-tuning of imported weights", model, train, DataConfig(path=folder, microbatch_size=4))


def find_preset(name: str) -> Preset:
    """Return the preset of that name.

    Raises:
        ConfigurationError: if there is none.
    """
    if name not in PRESETS:
        name = name[:50]
        nearest = sorted(difflib.get_close_matches(name, PRESETS, n=len(PRESETS)), key=list(PRESETS).index)
        hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"choose one of {', '.join(PRESETS)}."
        raise ConfigurationError(f"there is no preset {name!r}: {hint}")
    return PRESETS[name]
