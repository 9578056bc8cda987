"""What a training run really did, as plain data: updates, forwards, losses and checkpoints."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conformance.recording.snapshot import EmbeddingInfo, Group, TensorInfo

__all__ = ["Checkpoint", "EmbeddingInfo", "Forward", "Group", "Loss", "NotWritten", "TensorInfo", "Trace", "Update"]


@dataclass(frozen=True)
class Forward:
    """One call of the outermost module, or of the one inside that gave the logits, where the outermost gives a loss."""

    update: int
    """Updates done before it."""
    ids: Tensor
    """Token ids, (B, T)."""
    logits: Tensor
    """As they left that module: (B, T, V), dtype untouched."""
    training: bool
    grad_enabled: bool
    autocast: torch.dtype | None
    """The dtype of autocast inside the module; None where it was off."""
    inside: bool = False
    """The outermost module gave a loss, and the logits stayed inside."""


@dataclass(frozen=True)
class Loss:
    """A tensor on which backward was called."""

    update: int
    value: Tensor
    autocast: bool
    """Whether autocast was on when backward began."""


@dataclass(frozen=True)
class Update:
    """One call of ``Optimizer.step``."""

    optimizer: tuple[str, ...]
    """Class paths: of the optimizer, and of the classes that it derives from."""
    groups: tuple[Group, ...]
    gradients: dict[str, Tensor | None]
    """On entry, or after the closure where the stack hands one over. None where there was none."""
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    state_before: dict[str, dict[str, Any]]
    """Optimizer state by tensor, wherever the class keeps it."""
    state_after: dict[str, dict[str, Any]]
    autocast: bool


class NotWritten(FileNotFoundError):
    """A file that a checkpoint should have."""


@dataclass(frozen=True)
class Checkpoint:
    """Files that were written between two updates."""

    update: int
    """Updates done when they were written."""
    files: tuple[Path, ...]
    folder: Path | None = None
    """Of a checkpoint that does not exist: where its files would lie."""

    def find(self, name: str) -> Path:
        """The file called ``name``; for adapters, which know what their stack calls its files.

        Raises:
            NotWritten: if none is called so; the message lists those that were written.
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
    initial: dict[str, Tensor] = field(default_factory=dict)
    """Their values at the first forward."""
    buffers: dict[str, Tensor] = field(default_factory=dict)
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

    def checkpoint(self, update: int) -> Checkpoint | None:
        """The files written after ``update`` updates, if any."""
        return next((c for c in self.checkpoints if c.update == update), None)
