"""A recipe: what a subject is asked to train. Plain data, frozen and hashable, so equal recipes run once."""

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from conformance.trace import Checkpoint

DATA_SEED = 20240229  # of the token ids; another than Recipe.seed, which decides the weights only

_handed_out: ContextVar[list[tuple[dict[str, Any], dict[str, Any]]] | None] = ContextVar("handed_out", default=None)


@dataclass(frozen=True)
class OptimizerChoice:
    """An optimizer by class path, with keyword arguments as a user would write them in a config file."""

    class_path: str = "torch.optim.AdamW"
    arguments: tuple[tuple[str, Any], ...] = (("lr", 1e-2),)

    @classmethod
    def of(cls, class_path: str, **arguments: Any) -> "OptimizerChoice":
        """``OptimizerChoice.of("torch.optim.SGD", lr=0.1)``."""
        return cls(class_path, tuple(arguments.items()))

    def config(self) -> dict[str, Any]:
        """``{"class_path": ..., "init_args": {...}}``: a fresh dictionary, as a config file would give it.

        The recording remembers it, so that a clause can see whether the stack changed its user's configuration.
        """
        config = {"class_path": self.class_path, "init_args": dict(self.arguments)}
        remembered = _handed_out.get()
        if remembered is not None:
            remembered.append((config, copy.deepcopy(config)))
        return config


@contextmanager
def remember_configs() -> Iterator[list[tuple[dict[str, Any], dict[str, Any]]]]:
    """Collect every configuration handed out inside, as pairs (the live one, a copy made when it was given)."""
    configs: list[tuple[dict[str, Any], dict[str, Any]]] = []
    token = _handed_out.set(configs)
    try:
        yield configs
    finally:
        _handed_out.reset(token)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One tiny training run.

    An adapter maps every field onto its stack's own settings. What the stack has no setting for belongs into the
    subject's ``lacks``; the suite then never asks for it.
    """

    shape: Literal["gpt", "llama"] = "gpt"
    """gpt: LayerNorm, GELU, biases. llama: RMSNorm, SwiGLU, no biases. Positions as the stack does them."""
    module: str | None = None
    """``package.module:function`` that builds the module to train instead of the stack's own model
    (capability foreign-module). It maps token ids (B, T) to logits (B, T, V)."""
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 32
    vocab_size: int = 128
    """128 x 32 are 4096 elements: the smallest table for which bitsandbytes keeps 8-bit state."""
    block_size: int = 16
    """Tokens per sequence; a batch has one more."""
    tied: bool = False
    """The head shares the weight of the embedding."""
    seed: int = 1
    """Decides the weights."""
    precision: Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed"] = "32-true"
    """Fabric's names: -mixed keeps float32 weights and computes in 16 bits, -true keeps 16-bit weights."""
    optimizer: OptimizerChoice = field(default_factory=OptimizerChoice)
    microbatch_size: int = 2
    """Sequences per microbatch."""
    microbatches: int = 1
    """Microbatches per update."""
    updates: int = 2
    """Optimizer updates."""
    warmup: int = 0
    """Updates of linear warm-up."""
    minimum_lr: float | None = None
    """Learning rate that a cosine reaches at the end. None: constant after the warm-up."""
    clip: float | None = None
    """Largest global gradient norm. None: as good as unlimited."""
    decay: Literal["declared", "ndim"] = "declared"
    """declared: the stack's own policy. ndim: tensors of two and more dimensions decay (capability ndim-policy)."""
    evaluate: bool = False
    """Evaluate on validation_batches() after the last update."""
    save_every: int | None = None
    """Updates between checkpoints. None: whatever the stack does by itself."""
    resume: "Checkpoint | None" = None
    """Go on from this checkpoint, to ``updates`` in all (capability resume)."""
    stable_embedding: bool = False
    """Switch the stack's StableEmbedding option on (capability stable-embedding)."""
    logits: Literal["float32", "compute"] = "float32"
    """compute: let the logits leave in the dtype they were computed in (capability logits-opt-out)."""
    initialization: Literal["eager", "meta"] = "eager"
    """meta: build on the meta device and materialise afterwards, as FSDP does (capability meta-init)."""
    compile: bool = False
    """Train through torch.compile; the recorder keeps it eager (capability compile)."""
    world_size: int = 1
    """Ranks, on the CPU with gloo, started by the suite with torchrun's environment variables."""
    zero_gradients: bool = False
    """The recorder zeroes every gradient on entry to ``step``: what moves then is weight decay."""
    repeat: int = 0
    """Not for the adapter: another number makes an equal recipe run again."""
    directory: Path = field(default=Path(), compare=False)
    """Where the run may write. Set by the suite."""

    def batches(self, rank: int = 0) -> "list[torch.Tensor]":
        """Training data: ``updates * microbatches`` tensors of token ids (microbatch_size, block_size + 1), int64."""
        return self._tokens(self.updates * self.microbatches, stream=1 + rank)

    def validation_batches(self) -> "list[torch.Tensor]":
        """Validation data: two tensors like those of batches(), of other tokens."""
        return self._tokens(2, stream=0)

    def _tokens(self, count: int, stream: int) -> "list[torch.Tensor]":
        import torch

        generator = torch.Generator().manual_seed(DATA_SEED + stream)
        shape = (self.microbatch_size, self.block_size + 1)
        return [torch.randint(0, self.vocab_size, shape, generator=generator) for _ in range(count)]

    def missing_checkpoint(self) -> "Checkpoint":
        """A checkpoint that is not there, for asking what a stack does about it."""
        from conformance.trace import Checkpoint

        return Checkpoint(update=1, files=(), folder=Path(tempfile.gettempdir()) / "no-such-checkpoint")
