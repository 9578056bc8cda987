"""What a training run really did, as plain data: updates, forwards, losses, and checkpoints."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conformance.errors import NotWritten

if TYPE_CHECKING:  # so that whoever only reads a trace need not import PyTorch
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class TensorInfo:
    """A parameter of the trained module."""

    name: str
    """Dotted name without the prefixes of wrappers; of a tied tensor the first."""
    names: tuple[str, ...]
    """All names of the same tensor."""
    shape: tuple[int, ...]
    dtype: "torch.dtype"
    device: str
    trainable: bool
    owner: str
    """Class name of the module that holds it (under its first name)."""


@dataclass(frozen=True)
class EmbeddingInfo:
    """An nn.Embedding (or a subclass) of the trained module."""

    name: str
    kind: str
    """Class path."""
    shape: tuple[int, int]
    options: tuple[tuple[str, Any], ...]
    """padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse."""
    dtype: "torch.dtype"
    device: str


@dataclass(frozen=True)
class Group:
    """One parameter group, on entry to ``step``."""

    tensors: tuple[str, ...]
    """Names; a tensor that is not in the module is called ``foreign-<n>``."""
    settings: dict[str, Any]
    """lr, betas, weight_decay, ...: plain values; anything else as its repr."""


@dataclass(frozen=True)
class Forward:
    """One call of the outermost module, or of the one inside that gave the logits, where the outermost gives a loss."""

    update: int
    """Updates done before it."""
    ids: "Tensor"
    """Token ids, (B, T)."""
    logits: "Tensor"
    """As they left that module: (B, T, V), dtype untouched."""
    training: bool
    grad_enabled: bool
    autocast: "torch.dtype | None"
    """The dtype of autocast inside the module; None where it was off."""
    inside: bool = False
    """The outermost module gave a loss, and the logits stayed inside."""


@dataclass(frozen=True)
class Loss:
    """A tensor on which backward was called."""

    update: int
    value: "Tensor"
    autocast: bool
    """Whether autocast was on when backward began."""


@dataclass(frozen=True)
class Update:
    """One call of ``Optimizer.step``."""

    optimizer: tuple[str, ...]
    """Class paths: of the optimizer, and of the classes that it derives from."""
    groups: tuple[Group, ...]
    gradients: "dict[str, Tensor | None]"
    """On entry, or after the closure where the stack hands one over. None where there was none."""
    before: "dict[str, Tensor]"
    after: "dict[str, Tensor]"
    state_before: dict[str, dict[str, Any]]
    """Optimizer state by tensor, wherever the class keeps it."""
    state_after: dict[str, dict[str, Any]]
    autocast: bool


@dataclass(frozen=True)
class Checkpoint:
    """Files that were written between two updates."""

    update: int
    """Updates done when they were written."""
    files: tuple[Path, ...]
    folder: Path | None = None
    """Of a checkpoint that does not exist: where its files would lie."""

    def find(self, name: str) -> Path:
        """Return the file called ``name``; for adapters, which know what their stack calls its files.

        Raises:
            NotWritten: if there is no such file; the message lists those that were written.
        """
        if self.folder is not None:
            return self.folder / name
        for path in self.files:
            if path.name == name:
                return path
        raise NotWritten(f"no {name} was written at update {self.update}, only {[p.name for p in self.files]}")


@dataclass
class Trace:
    """What happened in one run, on one rank. Tensors are copies on the CPU."""

    rank: int = 0
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    """Parameters at the first forward, by name."""
    initial: "dict[str, Tensor]" = field(default_factory=dict)
    """Their values at the first forward."""
    buffers: "dict[str, Tensor]" = field(default_factory=dict)
    """Buffers at the first forward."""
    embeddings: tuple[EmbeddingInfo, ...] = ()
    forwards: list[Forward] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    """Log records, warnings, and lines printed to stdout and stderr, in this order."""
    changed_configs: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)
    """Optimizer configurations that the stack altered: (as given, as found afterwards)."""
    seconds: float = 0.0

    @property
    def trainable(self) -> list[str]:
        """Names of the trainable tensors."""
        return [name for name, info in self.tensors.items() if info.trainable]

    def training_forwards(self, update: int | None = None) -> list[Forward]:
        """Return the forwards in training mode and with gradients: those that led to ``update``, or to any."""
        return [f for f in self.forwards if f.training and f.grad_enabled and update in (None, f.update)]

    def checkpoint(self, update: int) -> Checkpoint | None:
        """Return the files written after ``update`` updates, if any."""
        return next((c for c in self.checkpoints if c.update == update), None)
