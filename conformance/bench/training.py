"""The reference's training step: optimizers, precisions, embedding, logits and compilation against each other.

One step is what ``Trainer.fit`` does for one update: fetch the next batch, forward, backward, clip, look at loss and
norm, step. It is judged in tokens per second and in MFU (conformance.bench.figures). The libraries beside it are in
conformance.bench.peers.

To add a row, add a line to GPT2_ROWS or LLAMA_ROWS.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from conformance.bench.case import TRAINING_STEP, Case, Prepared, Setting
from conformance.bench.models import (
    Updates,
    common_facts,
    compilation,
    compiles,
    draw,
    later_facts,
    random_batches,
    shape,
)
from conformance.bench.optimizer_state import PAGES, check_paging, describe_groups, forget_pages, optimizer_name
from conformance.errors import Unavailable
from reference import ConfigurationError, GPTConfig, TrainConfig

ADAMW: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}


def settings(**changes: Any) -> TrainConfig:
    """Return how a row trains: bf16-mixed, fused AdamW, clipped at 1, compiled, and what it has otherwise."""
    common: dict[str, Any] = {"optimizer_args": ADAMW, "schedule": "constant", "precision": "bf16-mixed"}
    return TrainConfig(**(common | {"logits": "compute", "compile": True} | changes))


@dataclass(frozen=True)
class Row:
    """One way to train."""

    name: str  # without the compilation, which the row's name gets from the settings and the device
    train: TrainConfig
    microbatch: int = 32  # sequences per step
    beside: str | None = None
    """The row that this one is interleaved with: both run the same compiled code, or none."""
    quick: bool = False  # whether a quick run has it
    seconds: float = 4.5  # for the whole row, on an H100
    compiling: float = 0.0  # as :attr:`Case.compiling`
    model: Mapping[str, Any] = field(default_factory=dict)
    """Settings in which the model differs from conformance.bench.models.shape."""
    note: str = ""
    priority: int = 2  # as :attr:`Case.priority`, in which 1 and 5 are the optimizer's step alone


EIGHT_BIT = "bitsandbytes.optim.AdamW8bit"
PAGED = "bitsandbytes.optim.PagedAdamW8bit"
ONE_LAUNCH = "reference.optimizers.adamw8bit.AdamW8bit"
FOREACH = ADAMW | {"foreach": True}  # what PyTorch does on a GPU unless told otherwise
FOR_LOOP = ADAMW | {"fused": False}  # not foreach: PyTorch takes it for "no kernel at all"
LARGE = "16-bit residual, microbatch 64"
NARROW = {"fp32_residual": False}
PRESET = "model, microbatch and settings of the preset gpt2-124m, which accumulates 8 microbatches into an update"
MIXED, TRUE = settings(), settings(precision="bf16-true")
EAGER, TRUE_EAGER = replace(MIXED, compile=False), replace(TRUE, compile=False)
FUSED, TRUE_FUSED = "bf16-mixed, AdamW fused", "bf16-true, AdamW fused"
SMALL_STATE, TRUE_SMALL_STATE = "bf16-mixed, AdamW8bit", "bf16-true, AdamW8bit"
STABLE: dict[str, Any] = {"optimizer": EIGHT_BIT, "stable_embedding": True}
# Rows of the same precision, embedding and batch stand together: they run the same compiled code (compiler_for).
# StableEmbedding is measured eager, where it can be interleaved with what it replaces.
GPT2_ROWS = (
    Row(FUSED, MIXED, quick=True, seconds=27, compiling=18),
    Row("bf16-mixed, AdamW foreach", replace(MIXED, optimizer_args=FOREACH), beside=FUSED, quick=True),
    Row("bf16-mixed, AdamW for-loop", replace(MIXED, optimizer_args=FOR_LOOP), beside=FUSED),
    Row(SMALL_STATE, replace(MIXED, optimizer=EIGHT_BIT), beside=FUSED),
    Row("bf16-mixed, AdamW8bit in one launch", replace(MIXED, optimizer=ONE_LAUNCH), beside=FUSED),
    Row("bf16-mixed, PagedAdamW8bit", replace(MIXED, optimizer=PAGED), beside=FUSED, note=PAGES),
    Row(TRUE_FUSED, TRUE, seconds=25, compiling=18, priority=3),
    Row(FUSED, EAGER, quick=True, priority=3),
    Row(f"{FUSED}, float32 logits", replace(EAGER, logits="float32"), beside=FUSED, priority=3),
    Row(SMALL_STATE, replace(EAGER, optimizer=EIGHT_BIT), beside=FUSED, priority=3),
    Row(f"{SMALL_STATE}, StableEmbedding", replace(EAGER, **STABLE), beside=SMALL_STATE, priority=3),
    Row(f"{FUSED}, 16-bit residual", MIXED, 32, model=NARROW, seconds=25, compiling=18, priority=6),
    Row(
        f"{FUSED}, 16-bit residual, microbatch 64",
        MIXED,
        64,
        model=NARROW,
        note=PRESET,
        seconds=25,
        compiling=18,
        priority=6,
    ),
)
LLAMA_ROWS = tuple(
    replace(row, microbatch=16, priority=4, seconds=max(row.seconds, 8.5))
    for row in (
        Row(TRUE_FUSED, TRUE, seconds=41, compiling=32),
        Row("bf16-true, AdamW foreach", replace(TRUE, optimizer_args=FOREACH), beside=TRUE_FUSED),
        Row("bf16-true, AdamW for-loop", replace(TRUE, optimizer_args=FOR_LOOP), beside=TRUE_FUSED),
        Row(TRUE_SMALL_STATE, replace(TRUE, optimizer=EIGHT_BIT), beside=TRUE_FUSED),
        Row(FUSED, MIXED, seconds=43, compiling=34),
        Row(TRUE_FUSED, TRUE_EAGER),
        Row(f"{TRUE_FUSED}, float32 logits", replace(TRUE_EAGER, logits="float32"), beside=TRUE_FUSED),
        Row(TRUE_SMALL_STATE, replace(TRUE_EAGER, optimizer=EIGHT_BIT), beside=TRUE_FUSED),
        Row(f"{TRUE_SMALL_STATE}, StableEmbedding", replace(TRUE_EAGER, **STABLE), beside=TRUE_SMALL_STATE),
    )
)


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Return the reference's rows, in the order in which they share code. On the CPU they are tiny, and eager."""
    tables = {"gpt2-124m": GPT2_ROWS} if quick else {"gpt2-124m": GPT2_ROWS, "llama-1.2b": LLAMA_ROWS}
    if Setting(device, quick).small:
        tables = {f"{size.partition('-')[0]}-tiny": rows for size, rows in tables.items()}

    def full_name(name: str, row: Row) -> str:
        return f"reference, {name}, {compilation(row.train.compile, device)}"

    return [
        Case(
            TRAINING_STEP,
            size,
            full_name(row.name, row),
            partial(prepare, row, replace(shape(size), **row.model)),
            beside=None if row.beside is None else full_name(row.beside, row),
            budget=3.0 if size == "llama-1.2b" else 1.5,
            seconds=row.seconds,
            graph=graph(size, row) if row.train.compile and compiles(device) else "",
            compiling=row.compiling,
            priority=row.priority,
        )
        for size, rows in tables.items()
        for row in rows
        if row.quick or not quick
    ]


def graph(size: str, row: Row) -> str:
    """Return :attr:`Case.graph`. Optimizers share it, since they step outside."""
    embedding = "StableEmbedding" if row.train.stable_embedding else "Embedding"
    return f"{size}, {row.train.precision}, {embedding}, microbatch {row.microbatch}, {dict(row.model)}"


def prepare(row: Row, config: GPTConfig, setting: Setting) -> Prepared:
    """Build one of the reference's rows, ready to step.

    Raises:
        Unavailable: if the optimizer or its package is not to be had here.
    """
    from reference import Trainer

    device = setting.device
    paged = row.train.optimizer == PAGED
    if paged:
        check_paging(device)
    train = replace(row.train, accelerator=device.type, compile=row.train.compile and compiles(device))
    microbatch = 2 if setting.small else row.microbatch
    try:
        run = Trainer(partial(draw, config, device), train).setup()
    except ConfigurationError as error:
        raise Unavailable(str(error)) from error
    updates = Updates(run, random_batches(config, microbatch, device), config.init_std)
    facts = common_facts(config, microbatch, device, run.module) | {
        "precision": train.precision,
        "optimizer": optimizer_name(run.bare),
        "compiled": compilation(row.train.compile, device),
        "logits": "inside the compiled graph" if train.compile else f"{train.logits} dtype",
        "embedding": type(run.module.embedding).__name__,
        "residual": "float32" if config.fp32_residual else "16 bits",
        "decays": describe_groups(run.bare),
        "host": "reads loss and gradient norm in each step",
    }
    if row.note:
        facts["note"] = row.note
    close = forget_pages if paged else lambda: None
    return Prepared(
        updates.step, facts, updates.reset, close, updates.batches, lambda: later_facts(updates.loss, run.bare)
    )
