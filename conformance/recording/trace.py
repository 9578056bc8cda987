"""What a training run really did, as plain data: updates, forwards, losses, and checkpoints."""

from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from conformance.errors import NotApplicable, NotWritten, Violation

T = TypeVar("T")

if TYPE_CHECKING:  # so that whoever only reads a trace need not import PyTorch
    import torch
    from torch import Tensor


class Named(dict[str, T]):
    """Values by the name of a tensor. Asking for a tensor that is not there raises Violation."""

    def __missing__(self, name: str) -> T:
        raise Violation(f"the tensor {name}, as the model has it elsewhere in the run", "it is not there")


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
    """One call of the trained model."""

    update: int
    """Updates done before it."""
    ids: "Tensor"
    """Token ids, (B, T)."""
    logits: "Tensor | None"
    """(B, T, V), as they left the outermost module that gives them, dtype untouched; None if no logits leave the model,
    as where it returns only its loss."""
    training: bool
    grad_enabled: bool
    autocast: "torch.dtype | None"
    """The dtype of autocast inside the module; None where it was off."""
    evaluation: int = 0
    """How often the closure of the step that is running had ended before: LBFGS evaluates its closure several times."""
    inside: bool = False
    """The outermost module gave a loss, and the logits stayed inside."""
    other_mode: tuple[str, ...] = ()
    """Submodules whose mode (training or eval) is not that of the model."""
    linears: "dict[str, torch.dtype]" = field(default_factory=dict)
    """Dtype of the output of each nn.Linear that was called, by its name."""
    rounded: tuple[str, ...] = ()
    """Of these, those whose input was in float32 and held bfloat16 numbers alone. Looked at before the first update, in
    runs whose tensors are kept whole."""

    @property
    def scores(self) -> "Tensor":
        """The logits, for a rule that needs them. Raises NotApplicable if none leave the model."""
        if self.logits is None:
            raise NotApplicable("no logits leave the model: it returns only its loss")
        return self.logits


@dataclass(frozen=True)
class CrossEntropy:
    """One call of ``torch.nn.functional.cross_entropy`` or ``nll_loss``."""

    update: int
    """Updates done before it."""
    targets: "Tensor"
    """Flattened, int64; ``ignore_index`` where nothing is to be predicted."""
    ignore_index: int
    reduction: str
    label_smoothing: float
    dtype: "torch.dtype"
    """In which it was computed: that of its result."""
    value: "Tensor"
    """Its result: a scalar, or one value per target where ``reduction`` is ``none``."""
    grad_enabled: bool

    @property
    def counted(self) -> int:
        """Number of targets that are not ignored."""
        return int((self.targets != self.ignore_index).sum())

    @property
    def labels(self) -> "Tensor":
        """The targets, with -100 where the model need not predict anything."""
        return self.targets.masked_fill(self.targets == self.ignore_index, -100)

    @property
    def total(self) -> float:
        """Sum over the targets that are not ignored."""
        return self.value.double().sum().item() * (self.counted if self.reduction == "mean" else 1)


@dataclass(frozen=True)
class Loss:
    """A tensor on which backward was called."""

    update: int
    value: "Tensor"
    autocast: bool
    """Whether autocast was on when backward began."""


@dataclass(frozen=True)
class Step:
    """One call of ``step`` of one optimizer."""

    optimizer: tuple[str, ...]
    """Class paths: of the optimizer, and of the classes that it derives from. Empty if it could not be seen."""
    groups: tuple[Group, ...]
    """On entry, or after the closure where the stack hands one over."""
    autocast: bool
    evaluations: int = 0
    """How often it called its closure."""
    in_backward: bool = False
    """It ran inside a backward pass."""
    skipped: bool = False
    """A gradient scaler saw a gradient that is not finite, and did not call it."""
    number: int = 0
    """Which optimizer of the run it is, in the order of their first steps: a run may make a new one on its way."""

    @property
    def tensors(self) -> list[str]:
        """Names of the tensors in its groups; a tensor that is listed twice is here twice."""
        return [name for group in self.groups for name in group.tensors]


@dataclass(frozen=True)
class Measures:
    """Figures of whole tensors, where only samples of their content are kept."""

    norms: "Named[Tensor]"
    """The 2-norm of each floating-point tensor: scalars, NaN or infinite where an element is."""
    bits: "Named[Tensor]"
    """A digest of each tensor's bits (torch.hash_tensor): another digest means another content. May be left out."""


@dataclass(frozen=True)
class Update:
    """All that optimizers do between one phase of backward passes and the next."""

    steps: tuple[Step, ...]
    """One optimizer or several, in the order in which they stepped."""
    gradients: "Named[Tensor | None]"
    """Of each tensor, as its own optimizer found it. None where there was none."""
    before: "Named[Tensor]"
    after: "Named[Tensor]"
    state_before: dict[str, dict[str, Any]]
    """Optimizer state by tensor, wherever the class keeps it."""
    state_after: dict[str, dict[str, Any]]
    masters: "Named[Tensor]" = field(default_factory=Named)
    """After the update, of tensors that the optimizer moves through master copies of another dtype: those copies."""
    unfounded: bool = False
    """An optimizer stepped again although no backward had come since its last step."""
    measured_gradients: Measures | None = None
    """Of the whole tensors, where ``gradients``, ``before`` and ``after`` hold samples; None where they are whole."""
    measured_before: Measures | None = None
    measured_after: Measures | None = None

    @property
    def moved_to(self) -> "Named[Tensor]":
        """The parameters after the update, as precisely as anybody holds them."""
        return Named({**self.after, **self.masters})

    @property
    def groups(self) -> tuple[Group, ...]:
        """The parameter groups of all optimizers."""
        return tuple(group for step in self.steps for group in step.groups)

    @property
    def optimizer(self) -> tuple[str, ...]:
        """Class paths of the first optimizer that stepped."""
        return self.steps[0].optimizer

    @property
    def skipped(self) -> bool:
        """Whether a gradient scaler skipped every step."""
        return all(step.skipped for step in self.steps)

    @property
    def autocast(self) -> bool:
        """Whether autocast was on when any of the optimizers stepped."""
        return any(step.autocast for step in self.steps)


@dataclass(frozen=True)
class Checkpoint:
    """Files that were written between two updates, as they were then."""

    update: int
    """Updates done when they were written."""
    files: tuple[Path, ...]
    """Where they were written. Logs and metrics are not among them."""
    folder: Path | None = None
    """Of a checkpoint that does not exist: where its files would lie."""
    copies: tuple[tuple[Path, int, int], ...] = ()
    """For each of the files: a copy of its content, and the time (ns) and size of the file when it was copied."""

    def find(self, name: str) -> Path:
        """Return the file or folder called ``name``; for adapters, which know what their stack calls its files.

        If a file of the checkpoint was written over since, the path is that of a copy, in a folder with copies of
        all files of the checkpoint.

        Args:
            name: a name, or a pattern such as ``*.ckpt`` that fits the name or the end of the path of a file, or else
                the name of a folder that holds files of the checkpoint, such as ``step-*``.

        Raises:
            NotWritten: if there is no such file; the message lists those that were written.
        """
        if self.folder is not None:
            return self.folder / name
        for path, place in zip(self.files, self.places(), strict=True):
            if fnmatch(path.name, name) or path.match(name):
                return place
        for path, place in zip(self.files, self.places(), strict=True):
            for above, folder in zip(path.parents, place.parents, strict=False):
                if fnmatch(above.name, name):
                    return folder
        raise NotWritten(f"no {name} was written at update {self.update}, only {[p.name for p in self.files]}")

    def places(self) -> tuple[Path, ...]:
        """Return where the content of each file lies: where it was written, or in copies if any was written over."""
        if all(unchanged(path, *copy[1:]) for path, copy in zip(self.files, self.copies, strict=False)):
            return self.files
        return tuple(copy for copy, _, _ in self.copies)


def unchanged(path: Path, time: int, size: int) -> bool:
    """Return True if a file still has the time of change (ns) and the size (bytes) that it had."""
    try:
        stat = path.stat()
    except OSError:
        return False
    return (stat.st_mtime_ns, stat.st_size) == (time, size)


@dataclass
class Trace:
    """What happened in one run, on one rank. Tensors are copies on the CPU."""

    rank: int = 0
    tensors: Named[TensorInfo] = field(default_factory=Named)
    """Parameters at the first forward, by name."""
    initial: "Named[Tensor]" = field(default_factory=Named)
    """Their values at the first forward."""
    measured_initial: Measures | None = None
    """Of the whole tensors, where ``initial`` holds samples."""
    buffers: "dict[str, Tensor]" = field(default_factory=dict)
    """Buffers at the first forward."""
    embeddings: tuple[EmbeddingInfo, ...] = ()
    shares: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Tensors that the optimizer moves through master copies (ZeRO), and the elements, from and up to, that this rank's
    copies hold. Beside those elements, what was recorded of the copies is 0 until the ranks are put together."""
    forwards: list[Forward] = field(default_factory=list)
    entropies: list[CrossEntropy] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    """Log records, warnings, and lines printed to stdout and stderr, in this order."""
    changed_configs: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)
    """Optimizer configurations that the stack altered: (as given, as found afterwards)."""
    notes: list[str] = field(default_factory=list)
    """What the recorder could not see, or saw and did not expect, in sentences."""
    seconds: float = 0.0

    @property
    def trainable(self) -> list[str]:
        """Names of the trainable tensors."""
        return [name for name, info in self.tensors.items() if info.trainable]

    def training_forwards(self, update: int | None = None) -> list[Forward]:
        """Return the forwards in training mode and with gradients: those that led to ``update``, or to any.

        Of a closure that its optimizer evaluates several times in one step, those of the first evaluation.
        """
        return [f for f in self.all_training_forwards(update) if f.evaluation == 0]

    def all_training_forwards(self, update: int | None = None) -> list[Forward]:
        """Return the same, with those of later evaluations of a closure."""
        return [f for f in self.forwards if f.training and f.grad_enabled and update in (None, f.update)]

    def update(self, index: int) -> Update:
        """Return an update, counted from 0, or from the end as -1. Raises Violation if the run made too few."""
        try:
            return self.updates[index]
        except IndexError:
            wanted = f"update {index + 1}" if index >= 0 else "an update"
            raise Violation(wanted, f"the run made {len(self.updates)} updates") from None

    def checkpoint(self, update: int) -> Checkpoint | None:
        """Return the files written after ``update`` updates, if any."""
        return next((c for c in self.checkpoints if c.update == update), None)
