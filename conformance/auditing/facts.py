"""What an audit knows of one process's run, as plain data: the trace, and what only an audit looks for."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from conformance.auditing.noticed import Noticed
from conformance.recording.trace import CrossEntropy, Named, Trace, Update
from conformance.recording.weights import fetched


@dataclass
class Backward:
    """One backward pass."""

    update: int
    """Updates done before it."""
    losses: list[Tensor]
    """What it began at."""
    norms: Named[Tensor] = field(default_factory=Named)
    """Of each gradient, when it had ended."""


@dataclass(frozen=True)
class Clip:
    """One call of ``clip_grad_norm_`` or ``clip_grad_value_``."""

    update: int
    backwards: int
    """Backward passes of this update that had ended."""
    tensors: tuple[str, ...]
    """What it was given: names of the model's tensors."""
    limit: float
    kind: str
    """``norm`` or ``value``."""
    norm: Tensor | None = None
    """What the call returned: the norm that it saw."""


@dataclass(frozen=True)
class Given:
    """What a cross entropy was computed from: figures of its first rows."""

    backward: int
    """Backward passes before it, in the whole recording."""
    name: str
    """``cross_entropy``, which wants logits, or ``nll_loss``, which wants log-probabilities."""
    dtype: torch.dtype
    lowest: Tensor | None = None
    """None, as the other two: not looked at, for there are many like it in one backward pass."""
    sums: Tensor | None = None
    """Of each of the first rows."""
    exponential_sums: Tensor | None = None
    """Log of the sum of the exponentials of each of the first rows: 0 for log-probabilities."""


@dataclass(frozen=True)
class Said:
    """A line that the run printed or logged."""

    update: int
    """Updates done when it was said."""
    text: str


@dataclass
class Call:
    """The arguments of the model's last training forward, for the audit's own forwards."""

    module: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Probed:
    """What the audit's own forwards showed. None: not tried, for the reason in ``unseen``."""

    entropies: tuple[tuple[CrossEntropy, "Given | None", Tensor], ...] = ()
    """Cross entropies of one forward, run as it was written, with what they were given and the token ids: of a compiled
    run, inside which nothing is seen."""

    looks_ahead: int | None = None
    """The first position whose logits changed although only later tokens had; -1 if there is none."""
    rows_mix: bool | None = None
    """The logits of one sequence changed when another one did."""
    uses_context: bool | None = None
    """The last logit changes when the tokens before it change."""
    unseen: str = ""


@dataclass
class Facts:
    """One process's run."""

    trace: Trace = field(default_factory=Trace)
    rank: int = 0
    world: int = 1
    connected: bool = True
    """torch.distributed had a process group when the first backward began, or was not looked at."""
    asked: int = 4
    """Updates that were to be recorded."""
    backwards: list[Backward] = field(default_factory=list)
    leftovers: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """By update: norms of the gradients that were there before its first backward pass began."""
    clips: list[Clip] = field(default_factory=list)
    given: list[Given | None] = field(default_factory=list)
    """For each cross entropy of the trace; None where its input is no plain tensor."""
    said: list[Said] = field(default_factory=list)
    leaves: set[str] | None = None
    """Names of the tensors that the first loss depends on; None if that was not seen."""
    foreign_leaves: list[tuple[int, ...]] = field(default_factory=list)
    """Shapes of trained leaves of the first loss that are not parameters of the model."""
    unregistered: dict[str, str] = field(default_factory=dict)
    """Modules that were called inside the model and are not among its modules: class, by the name of a parameter."""
    dropout: dict[str, bool] = field(default_factory=dict)
    """Dropout with a probability above 0, by name: whether it was on in the first training forward."""
    normalises_batch: bool = False
    """The model has a BatchNorm, which its mode matters to."""
    generators: dict[str, int] = field(default_factory=dict)
    """By device: a digest of the state of the default generator at the first training forward."""
    tied_at_end: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sharded: set[str] = field(default_factory=set)
    """Tensors of which this process holds a part only."""
    offsets: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Where the part begins in the whole tensor, by dimension, where that is known."""
    model: str = ""
    """Class path of the model."""
    wrappers: tuple[str, ...] = ()
    """Class names of what wraps the model: DistributedDataParallel, FSDP, ..."""
    compiled: bool = False
    seconds: list[float] = field(default_factory=list)
    """Wall time of each update, by the host's clock, from one end of step to the next."""
    idle: tuple[int, int] = (0, 0)
    """How often the GPU had nothing left to do when the host came to a gate, and how often that was asked."""
    device: str = "cpu"
    seed: int | None = None
    """Of PyTorch's generator, at the first backward."""
    made_with: tuple[float, ...] = ()
    """Learning rates that the optimizers were made with."""
    probed: Probed = field(default_factory=lambda: Probed(unseen="the run ended before the audit could run the model"))
    noticed: Noticed = field(default_factory=Noticed)
    weights: list[list[tuple[float, int]]] = field(default_factory=list)
    """By update and backward: the weight of a target in the loss, and their number; filled for other processes."""
    reported: bool = True
    """False for a rank of which nothing was heard."""

    @property
    def updates(self) -> list[Update]:
        return self.trace.updates


def fetch(facts: Facts) -> None:
    """Bring to the CPU what the recording left on the device."""
    trace = facts.trace
    trace.initial, trace.buffers = fetched(trace.initial), dict(fetched(trace.buffers))
    trace.measured_initial = brought(trace.measured_initial)
    trace.forwards, trace.entropies = all_with_cpu(trace.forwards), all_with_cpu(trace.entropies)
    trace.losses, facts.given, facts.clips = (all_with_cpu(each) for each in (trace.losses, facts.given, facts.clips))
    trace.updates = [with_cpu(entry) for entry in trace.updates]
    for backward in facts.backwards:
        backward.losses = [loss.cpu() for loss in backward.losses]
        backward.norms = fetched(backward.norms)
    facts.leftovers = {update: dict(fetched(norms)) for update, norms in facts.leftovers.items()}


def all_with_cpu(entries: list[Any]) -> list[Any]:
    """Return small frozen records with their tensors on the CPU: one copy for all, as there may be thousands."""
    tensors = {
        f"{number} {name}": value
        for number, entry in enumerate(entries)
        for name, value in ({} if entry is None else vars(entry)).items()
        if isinstance(value, Tensor)
    }
    found = fetched(tensors)
    return [
        entry and replace(entry, **{name: found[f"{n} {name}"] for name in vars(entry) if f"{n} {name}" in found})
        for n, entry in enumerate(entries)
    ]


def with_cpu(entry: Any) -> Any:
    """Return a frozen record with its tensors, and named tensors, on the CPU."""
    return type(entry)(**{name: brought(value) for name, value in vars(entry).items()})


def brought(value: Any) -> Any:
    """Return a value with all tensors in it on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, Named):
        tensors = fetched({name: tensor for name, tensor in value.items() if isinstance(tensor, Tensor)})
        return Named({name: tensors.get(name, other) for name, other in value.items()})
    if isinstance(value, dict):
        return {key: brought(item) for key, item in value.items()}
    if hasattr(value, "norms") and hasattr(value, "bits"):
        return with_cpu(value)
    return value
