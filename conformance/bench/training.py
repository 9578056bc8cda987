"""The reference's training step: optimizers, precisions, embedding, logits and compilation against each other.

One step is what ``Trainer.fit`` does for one update: fetch the next batch, forward, backward, clip, look at loss and
norm, step. What it gives is judged in tokens per second and in MFU (conformance.bench.throughput). The libraries beside
it are in conformance.bench.peers.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from conformance.bench.case import Case, Prepared, Setting, Unavailable
from conformance.bench.optimizer_step import clear_state, state_bytes
from reference.config import ConfigurationError, GPTConfig, TrainConfig
from reference.training.throughput import dense_peak, flops_per_token

if TYPE_CHECKING:
    from reference.training.run import Run

GROUP = "training step"
ADAMW: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
FORMULA = (
    "6 N + 12 L d T FLOPs per token, as PaLM counts (arXiv:2204.02311, appendix B); causal: 6 N + 6 L d T. "
    "N weights of linear layers and head, L layers, d width, T tokens per sequence"
)


def settings(**changes: Any) -> TrainConfig:
    """How the rows train, with what one of them has otherwise: bf16-mixed, fused AdamW, clipped at 1, compiled."""
    common: dict[str, Any] = {"optimizer_args": ADAMW, "schedule": "constant", "precision": "bf16-mixed"}
    return TrainConfig(**(common | {"logits": "compute", "compile": True} | changes))


@dataclass(frozen=True)
class Row:
    """One way to train."""

    name: str
    """Without the compilation, which the row's name gets from the settings and the device."""
    train: TrainConfig = field(default_factory=settings)
    microbatch: int = 32
    """Sequences per step."""
    beside: str | None = None
    """The row that this one is interleaved with: one that runs the same compiled code, or none either."""
    quick: bool = False
    """Whether a quick run has it."""
    seconds: float = 4.5
    """For the whole row, on an H100."""
    compiling: float = 0.0
    """As :attr:`Case.compiling`."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """What the model has otherwise than :func:`shape`."""
    note: str = ""
    priority: int = 2
    """As :attr:`Case.priority`, in which 1 and 5 are the optimizer's step alone."""


EIGHT_BIT = "bitsandbytes.optim.AdamW8bit"
PAGED = "bitsandbytes.optim.PagedAdamW8bit"
TRUE = settings(precision="bf16-true")
FUSED = "bf16-mixed, AdamW fused"
NARROW = {"fp32_residual": False}
PRESET = "model, microbatch and settings of the preset gpt2-124m, which accumulates 8 microbatches into an update"
FOREACH = settings(optimizer_args=ADAMW | {"foreach": True})  # what PyTorch does on a GPU unless told otherwise
FOR_LOOP = settings(optimizer_args=ADAMW | {"fused": False})  # not foreach: PyTorch takes it for "no kernel at all"
EAGER = settings(compile=False)
# Rows of the same precision, embedding and batch stand together: they run the same compiled code (compiler_for).
# StableEmbedding is measured eager, where it can be interleaved with what it replaces.
GPT2_ROWS = (
    Row(FUSED, quick=True, seconds=27, compiling=18),
    Row("bf16-mixed, AdamW foreach", FOREACH, beside=FUSED, quick=True),
    Row("bf16-mixed, AdamW for-loop", FOR_LOOP, beside=FUSED),
    Row("bf16-mixed, AdamW8bit", settings(optimizer=EIGHT_BIT), beside=FUSED),
    Row("bf16-mixed, PagedAdamW8bit", settings(optimizer=PAGED), beside=FUSED),
    Row("bf16-true, AdamW fused", TRUE, seconds=25, compiling=18, priority=3),
    Row(FUSED, EAGER, quick=True, priority=3),
    Row(f"{FUSED}, float32 logits", replace(EAGER, logits="float32"), beside=FUSED, priority=3),
    Row("bf16-mixed, AdamW8bit", replace(EAGER, optimizer=EIGHT_BIT), beside=FUSED, priority=3),
    Row(
        "bf16-mixed, AdamW8bit, StableEmbedding",
        replace(EAGER, optimizer=EIGHT_BIT, stable_embedding=True),
        beside="bf16-mixed, AdamW8bit",
        priority=3,
    ),
    Row(f"{FUSED}, 16-bit residual", model=NARROW, seconds=25, compiling=18, priority=6),
    Row(
        f"{FUSED}, 16-bit residual, microbatch 64",
        microbatch=64,
        model=NARROW,
        note=PRESET,
        seconds=25,
        compiling=18,
        priority=6,
    ),
)
TRUE_FUSED = "bf16-true, AdamW fused"
TRUE_EAGER = replace(TRUE, compile=False)
LLAMA_ROWS = tuple(
    replace(row, microbatch=16, priority=4, seconds=max(row.seconds, 8.5))
    for row in (
        Row(TRUE_FUSED, TRUE, seconds=41, compiling=32),
        Row("bf16-true, AdamW foreach", replace(FOREACH, precision="bf16-true"), beside=TRUE_FUSED),
        Row("bf16-true, AdamW for-loop", replace(FOR_LOOP, precision="bf16-true"), beside=TRUE_FUSED),
        Row("bf16-true, AdamW8bit", replace(TRUE, optimizer=EIGHT_BIT), beside=TRUE_FUSED),
        Row(FUSED, seconds=43, compiling=34),
        Row(TRUE_FUSED, TRUE_EAGER),
        Row(f"{TRUE_FUSED}, float32 logits", replace(TRUE_EAGER, logits="float32"), beside=TRUE_FUSED),
        Row("bf16-true, AdamW8bit", replace(TRUE_EAGER, optimizer=EIGHT_BIT), beside=TRUE_FUSED),
        Row(
            "bf16-true, AdamW8bit, StableEmbedding",
            replace(TRUE_EAGER, optimizer=EIGHT_BIT, stable_embedding=True),
            beside="bf16-true, AdamW8bit",
        ),
    )
)


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The reference's rows, in the order in which they share compiled code. On the CPU with tiny shapes, and eager."""
    small = Setting(device, quick).small
    table: dict[str, tuple[Row, ...]] = {"gpt2-tiny" if small else "gpt2-124m": GPT2_ROWS}
    if not quick:
        table["llama-tiny" if small else "llama-1.2b"] = LLAMA_ROWS

    def full_name(name: str, row: Row) -> str:
        return f"reference, {name}, {compilation(row.train.compile, device)}"

    return [
        Case(
            GROUP,
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
        for size, rows in table.items()
        for row in rows
        if row.quick or not quick
    ]


def shape(size: str) -> GPTConfig:
    """The model of a size: GPT-2 or Llama over 1024 tokens, or either of them tiny."""
    tiny = {"vocab_size": 256, "block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32}
    make = GPTConfig.gpt2 if size.startswith("gpt2") else GPTConfig.llama
    return make(**(tiny if size.endswith("tiny") else {"block_size": 1024}))


def graph(size: str, row: Row) -> str:
    """As :attr:`Case.graph`. Optimizers share it, since they step outside."""
    embedding = "StableEmbedding" if row.train.stable_embedding else "Embedding"
    return f"{size}, {row.train.precision}, {embedding}, microbatch {row.microbatch}, {dict(row.model)}"


def compiles(device: torch.device) -> bool:
    """Whether rows that are to be compiled are: inductor takes minutes on a CPU, where no figure counts."""
    return device.type == "cuda"


def compilation(wanted: bool, device: torch.device) -> str:
    """What is done about compilation, as the end of a row's name."""
    if not wanted:
        return "eager"
    return "compiled" if compiles(device) else f"compilation off on the {device.type.upper()}"


def prepare(row: Row, config: GPTConfig, setting: Setting) -> Prepared:
    """One of the reference's rows, ready to step.

    Raises:
        Unavailable: if the optimizer or its package is not to be had here.
    """
    from reference.training.trainer import Trainer

    device = setting.device
    paged = row.train.optimizer == PAGED
    if paged and device.type != "cuda":
        raise Unavailable("bitsandbytes pages an optimizer's state through CUDA's unified memory only.")
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
    note = "moments in managed memory, which the peak does not count" if paged else row.note
    if note:
        facts["note"] = note
    return Prepared(
        updates.step,
        facts,
        updates.reset,
        forget_pages if paged else None,
        updates.batches,
        lambda: later_facts(updates.loss, run.bare),
    )


class Updates:
    """Update after update of a run, as ``Trainer.fit`` does them."""

    def __init__(self, run: "Run", batches: list[Tensor], init_std: float) -> None:
        """Begin with the first batch.

        Args:
            run: fresh from ``Trainer.setup``, its model from :func:`draw`.
            batches: token ids (B, T + 1) each, taken in turn.
            init_std: that the weights were drawn with.
        """
        self.run, self.batches, self.init_std = run, batches, init_std
        self.begin()

    def begin(self) -> None:
        """Begin with the first batch again."""
        self.update, self.loss = 0, float("nan")
        self.source = itertools.cycle(self.batches)
        self.upcoming = self.run.fetch(self.source)

    def step(self) -> None:
        """One update; the next batch is fetched meanwhile."""
        done = self.run.update_once(self.update, self.upcoming, self.source)
        self.update, self.loss, self.upcoming = self.update + 1, done.loss, done.following

    def reset(self) -> None:
        """Back to the start, in place: compiled code and captured graphs know the tensors by address."""
        fill(self.run.module, self.init_std)
        self.run.bare.zero_grad()
        clear_state(self.run.bare)
        self.begin()


def optimizer_name(optimizer: Optimizer) -> str:
    """Its class, and which of PyTorch's implementations steps, where there is a choice: ``AdamW (fused)``."""
    name, chosen = type(optimizer).__name__, optimizer.defaults
    if "fused" not in chosen:
        return name
    return f"{name} ({'fused' if chosen['fused'] else 'foreach' if chosen['foreach'] else 'for-loop'})"


def describe_groups(optimizer: Optimizer) -> str:
    """How many parameter groups an optimizer has, and how many of the parameters decay."""
    groups = [(sum(p.numel() for p in group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
    share = sum(numbers for numbers, decay in groups if decay) / sum(numbers for numbers, _ in groups)
    return f"{share:.1%} of the parameters, in {len(groups)} {'group' if len(groups) == 1 else 'groups'}"


def forget_pages() -> None:
    """Have bitsandbytes forget the paged state of all optimizers, which it keeps for the life of the process."""
    from bitsandbytes.functional import GlobalPageManager

    GlobalPageManager.get_instance().paged_tensors.clear()


def draw(config: GPTConfig, device: torch.device) -> nn.Module:
    """A GPT whose weights are drawn on the device, in the default dtype.

    The reference draws on the CPU, so that a run starts the same everywhere, which takes seconds for 1.3 billion
    weights. Speed does not depend on it.
    """
    from reference.model.gpt import GPT

    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=device)
    if config.tie_embeddings:
        model.head.weight = model.embedding.weight  # to_empty() gives every name memory of its own
    fill(model, config.init_std)
    if model.rotary is not None:
        model.rotary.reset_parameters()
    return model


@torch.no_grad()
def fill(model: nn.Module, init_std: float) -> None:
    """Matrices from normal(0, init_std), norms 1, biases 0; the same numbers at each call, in place."""
    generator = None
    for name, parameter in model.named_parameters():
        if generator is None:
            generator = torch.Generator(parameter.device).manual_seed(0)
        if parameter.ndim > 1:
            parameter.normal_(0.0, init_std, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def random_batches(config: GPTConfig, microbatch: int, device: torch.device, count: int = 8) -> list[Tensor]:
    """Different batches of random token ids, (microbatch, T + 1) int64, on the CPU as data comes; pinned for a GPU."""
    generator = torch.Generator().manual_seed(0)
    size = (microbatch, config.block_size + 1)
    batches = [torch.randint(config.vocab_size, size, generator=generator) for _ in range(count)]
    return [batch.pin_memory() for batch in batches] if device.type == "cuda" else batches


def common_facts(config: GPTConfig, microbatch: int, device: torch.device, module: nn.Module) -> dict[str, float | str]:
    """What is known of any row beforehand. FLOPs are those of the reference's shape, also where a peer's differs."""
    facts: dict[str, float | str] = {
        "tokens": microbatch * config.block_size,
        "microbatch": microbatch,
        "length": config.block_size,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "flops_per_token": flops_per_token(config, config.block_size),
        "flops_per_token_causal": flops_per_token(config, config.block_size, causal=True),
        "formula": FORMULA,
        "batches": "random tokens, from pinned memory" if device.type == "cuda" else "random tokens",
        "clip": 1.0,
    }
    if device.type == "cuda":
        facts["card"] = torch.cuda.get_device_name(device)
        peak = dense_peak(str(facts["card"]), torch.bfloat16)
        if peak is not None:
            facts["dense_peak"] = peak
    return facts


def later_facts(loss: Any, optimizer: Optimizer) -> dict[str, float | str]:
    """What is known of any row after its steps."""
    numbers = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    return {"last loss": float(loss), "state bytes per parameter": state_bytes(optimizer) / numbers}
