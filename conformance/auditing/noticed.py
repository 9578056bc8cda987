"""What an audit notices beside the recording: loads, generators, schedules, dropout where it should be off."""

import contextlib
import functools
import hashlib
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.optim import Optimizer

from conformance.recording.recorder import Recorder
from conformance.recording.snapshot import find_ids
from conformance.recording.weights import Sketch, local, norms

COARSE = (torch.bfloat16, torch.float16)
PHASES = ("cos", "sin", "rope", "rotary", "freqs")
"""Words in the names of buffers that hold the phases of positions."""
RESUMING = ("resume", "checkpoint", "ckpt", "load", "init-from", "restore")
COUNTERS = ("step", "iter", "epoch", "update")
DECODER = ("dec", "tgt", "trg")
"""How the names of arguments begin that are the ids of a decoder; labels look alike, and are none."""
STATE_BYTES = 5056
"""Size of the state of PyTorch's generator on the CPU."""


@dataclass
class Load:
    """One call of ``load_state_dict`` of a module, before training began."""

    kind: str
    given: int
    """Tensors that it was given."""
    taken: int
    """Of those, tensors that the module has by that name."""
    coarse: int
    """16-bit tensors that went into float32 ones."""
    digests: dict[int, Tensor] = field(default_factory=dict)
    """Of the module's tensors after it, by identity."""


@dataclass
class Read:
    """What one call of ``torch.load`` gave."""

    moments: int = 0
    """Tensors that its optimizers' states are of."""
    rates: list[float] = field(default_factory=list)
    """The last rates of its schedules."""
    peaks: list[float] = field(default_factory=list)
    """The rates that its schedules began with."""
    generators: list[int] = field(default_factory=list)
    """Digests of states of PyTorch's generator."""
    counted: bool = False
    """It holds a counter of steps, iterations or epochs above 0."""


@dataclass
class Noticed:
    """Plain data, beside the trace."""

    states: list[int] = field(default_factory=list)
    """Digest of the state of the default generator at the first backward of each update."""
    cleared: list[tuple[int, str]] = field(default_factory=list)
    """Update, and tensor: its gradient was gone when a later backward of the same update began."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """Norms of the gradients that were there when a step evaluated its closure again."""
    drops: list[str] = field(default_factory=list)
    """What dropped something in a forward without gradients, while the model was in eval mode."""
    evaluations: int = 0
    """Forwards without gradients of a model in eval mode."""
    averages_unused: bool = False
    """A schedule-free optimizer was in training mode while the model was evaluated."""
    averages: bool = False
    """A schedule-free optimizer was there while the model was evaluated."""
    recomputed: list[bool] = field(default_factory=list)
    """For each activation checkpoint, whether it keeps the generator's state."""
    second_ids: list[Tensor] = field(default_factory=list)
    """The ids of a decoder with which the model was called before training began."""
    labels: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Ids and labels, both (B, T), with which the model was called for training."""
    scheduled: dict[int, int] = field(default_factory=dict)
    """Steps of each learning-rate schedule since the first backward."""
    phases: dict[str, int] = field(default_factory=dict)
    """By buffer with the phases of positions: how many positions have the phase of the one before."""
    loads: list[Load] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    restored: list[int] = field(default_factory=list)
    """Digests of the states that the generator was set to before training began."""
    overwritten: list[str] = field(default_factory=list)
    """Tensors of the model that were loaded and had another content at the first forward."""
    loaded: int = 0
    """Tensors of the model that were loaded."""
    asked: bool = False
    """An option of the command line says that the run resumes."""
    promised: list[str] = field(default_factory=list)
    """Tensors of the model that an optimizer was made for which is still there."""
    absent: list[str] = field(default_factory=list)
    """Files named on the command line to resume from, which are not there."""


def digest_of(state: Tensor) -> int:
    """Return a number that stands for the content of a tensor of bytes."""
    return int.from_bytes(hashlib.blake2b(state.cpu().numpy().tobytes(), digest_size=7).digest(), "little")


def bits_of(tensor: Tensor) -> Tensor:
    """Return a digest of a tensor's bits, on its device."""
    with torch.no_grad(), torch._C.DisableTorchFunction():
        return torch.hash_tensor(local(tensor))


def read_checkpoint(content: Any) -> Read:
    """Return what a loaded file holds for a resume."""
    found = Read()

    def look(value: Any, key: str, depth: int) -> None:
        if isinstance(value, Tensor):
            owned = any(word in key.lower() for word in ("generator", "data", "loader", "sampler"))
            if value.dtype == torch.uint8 and value.numel() == STATE_BYTES and not owned:
                found.generators.append(digest_of(value))
        elif isinstance(value, dict):
            if isinstance(value.get("state"), dict) and isinstance(value.get("param_groups"), list):
                found.moments += len(value["state"])
                return
            rates = value.get("_last_lr")
            if "last_epoch" in value and isinstance(rates, list):
                found.rates += [float(rate) for rate in rates]
                found.peaks += [float(rate) for rate in value.get("base_lrs", [])]
                return
            if depth < 4:
                for name, item in value.items():
                    look(item, str(name), depth + 1)
        elif isinstance(value, list | tuple) and depth < 4 and len(value) < 64:
            for item in value:
                look(item, key, depth + 1)
        elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
            found.counted |= any(word in key.lower() for word in COUNTERS)

    look(content, "", 0)
    return found


def named_but_absent(arguments: list[str]) -> list[str]:
    """Return the files that a command line names to resume from and that do not exist."""
    found = []
    for number, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if not option.startswith("-") or not any(word in option.lower().replace("_", "-") for word in RESUMING):
            continue
        value = value if equals else next(iter(arguments[number + 1 : number + 2]), "")
        is_file = ("." in Path(value).name or "/" in value) and "://" not in value and not value.startswith("-")
        if value and is_file and not Path(value).exists():
            found.append(value)
    return found


def is_matrix_of_ids(value: Any) -> bool:
    """Return True for an integer tensor of two dimensions, with content."""
    if not isinstance(value, Tensor) or value.ndim != 2 or value.is_meta:
        return False
    return not value.is_floating_point() and value.dtype != torch.bool


def repeated_phases(root: nn.Module) -> dict[str, int]:
    """Return how many positions have the same phases as the one before, by buffer that holds phases."""
    found = {}
    for name, buffer in root.named_buffers():
        words = name.rpartition(".")[2].lower()
        if not any(word in words for word in PHASES) or buffer.is_meta or hasattr(buffer, "placements"):
            continue
        table = buffer.squeeze()
        if table.ndim == 2 and table.size(0) >= 8 and table.size(1) >= 2:
            with torch.no_grad(), torch._C.DisableTorchFunction():
                found[name] = int((table[1:] == table[:-1]).all(-1).sum())
    return found


def averages(group: dict[str, Any]) -> bool:
    """Return True for a parameter group of a schedule-free optimizer, which has a mode."""
    return isinstance(group.get("train_mode"), bool)


class Noticer:
    """Notes what passes the gates beside the recording's."""

    def __init__(self, noticed: Noticed) -> None:
        self.noticed = noticed
        self.began = False
        """Whether the first backward has begun."""
        self.promises: list[tuple[weakref.ref[Optimizer], weakref.ref[Tensor]]] = []
        self.closures = 0
        """Evaluations of a closure that had ended before the last backward."""

    def begin(self, root: nn.Module | None) -> None:
        """Note, at the first backward, how the model and the command line stand."""
        self.began = True
        self.noticed.absent = named_but_absent(sys.argv[1:])
        self.noticed.asked = any("resume" in word.lower() for word in sys.argv[1:])
        if root is not None:
            self.noticed.phases = repeated_phases(root)

    def loaded(self, module: nn.Module, state: Any) -> None:
        """Note what a module was given to load."""
        if self.began or not isinstance(state, dict):
            return
        own = dict(module.named_parameters(remove_duplicate=False))
        given = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        taken = [name for name in given if name in own]
        coarse = sum(given[name].dtype in COARSE and own[name].dtype == torch.float32 for name in taken)
        if own and given:
            buffers = {name for name, _ in module.named_buffers()}
            count = len([name for name in given if name not in buffers])
            digests = {id(own[name]): bits_of(own[name]) for name in taken if not own[name].is_meta}
            self.noticed.loads.append(Load(type(module).__name__, count, len(taken), coarse, digests))

    def evaluated(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Note an outermost call, if it is one of a model in eval mode, and the mode of optimizers with averages."""
        if torch.is_grad_enabled() or module.training:
            return
        self.noticed.evaluations += 1
        modes = [group["train_mode"] for optimizer in optimizers for group in optimizer.param_groups if averages(group)]
        self.noticed.averages |= bool(modes)
        self.noticed.averages_unused |= any(modes)

    def dropped(self, name: str, running: Sequence[nn.Module]) -> None:
        """Note a call that drops something, if it is one of a model in eval mode."""
        if running and not torch.is_grad_enabled() and not running[0].training:
            words = f"{name} in {type(running[-1]).__name__}"
            if words not in self.noticed.drops:
                self.noticed.drops.append(words)

    def called(self, module: nn.Module, args: Any, kwargs: Any, sketch: Sketch) -> None:
        """Note the labels of a training call of the model, if it was given any."""
        ids, labels = find_ids(args, kwargs), kwargs.get("labels")
        if not self.began:
            with contextlib.suppress(TypeError, ValueError):  # no signature, or not one of these arguments
                given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
                found = [t for name, t in given.items() if name.lower().startswith(DECODER) and t is not ids]
                self.noticed.second_ids = [sketch.keep_small(t) for t in found if is_matrix_of_ids(t)]
        if ids is not None and isinstance(labels, Tensor) and labels.shape == ids.shape and not labels.is_meta:
            self.noticed.labels.append((sketch.keep_small(ids), sketch.keep_small(labels)))

    def backward_begins(self, recorder: Recorder, backwards: Sequence[Any], fresh: bool) -> None:
        """Note what became of gradients since the last backward, and where the generator stands.

        Args:
            recorder: of the run.
            backwards: the backward passes before.
            fresh: it is the first of an update.
        """
        tensors = recorder.calls.tensors()
        if fresh:
            self.noticed.states.append(digest_of(torch.get_rng_state()))
        elif recorder.stepping and recorder.evaluations > self.closures:  # LBFGS evaluates its closure again
            self.noticed.kept.update(norms({n: local(t.grad) for n, t in tensors.items() if t.grad is not None}))
        elif backwards and backwards[-1].update == recorder.done:
            gone = [name for name, t in tensors.items() if t.grad is None and name in backwards[-1].norms]
            self.noticed.cleared += [(recorder.done, name) for name in gone[:1]]
        self.closures = recorder.evaluations

    def made_for(self, optimizer: Optimizer, group: Any) -> None:
        """Note what an optimizer was made for."""
        tensors = group.get("params") if isinstance(group, dict) else None
        for tensor in tensors if isinstance(tensors, list | tuple) else ():
            if isinstance(tensor, Tensor):
                self.promises.append((weakref.ref(optimizer), weakref.ref(tensor)))

    def held(self) -> set[int]:
        """Return the identities of the tensors that an optimizer was made for, if it is still there."""
        found = [tensor() for optimizer, tensor in self.promises if optimizer() is not None]
        return {id(tensor) for tensor in found if tensor is not None}

    def keep_promises(self, tensors: dict[str, Tensor]) -> None:
        """Note which of the model's tensors an optimizer was made for, if it is still there."""
        kept = self.held()
        self.noticed.promised = [name for name, tensor in tensors.items() if id(tensor) in kept]
        self.promises = []

    def compare_with_loads(self, tensors: dict[str, Tensor], at_start: dict[str, Tensor]) -> None:
        """Note which of the model's tensors had another content at the first forward than when they were loaded."""
        known: dict[int, Tensor] = {}
        for load in self.noticed.loads:
            known |= load.digests
            load.digests = {}
        pairs = {name: known[id(t)] for name, t in tensors.items() if id(t) in known and name in at_start}
        self.noticed.loaded = len(pairs)
        self.noticed.overwritten = [name for name, bits in pairs.items() if not torch.equal(bits, at_start[name])]


@contextlib.contextmanager
def noticing(noticer: Noticer, careful: Callable[[Callable[[], None]], None]) -> Iterator[None]:
    """Open the gates beside the recording's.

    Args:
        noticer: is told.
        careful: calls a function that must not harm the run.
    """
    noticed = noticer.noticed

    def after_load(result: Any, args: Any, kwargs: Any) -> None:
        if not noticer.began and isinstance(result, dict):
            noticed.reads.append(read_checkpoint(result))

    def after_state(result: Any, args: Any, kwargs: Any) -> None:
        noticer.loaded(args[0], args[1] if len(args) > 1 else kwargs.get("state_dict"))

    def after_group(result: Any, args: Any, kwargs: Any) -> None:
        noticer.made_for(args[0], args[1] if len(args) > 1 else kwargs.get("param_group"))

    def after_schedule(result: Any, args: Any, kwargs: Any) -> None:
        if noticer.began:
            noticed.scheduled[id(args[0])] = noticed.scheduled.get(id(args[0]), 0) + 1

    def after_generator(result: Any, args: Any, kwargs: Any) -> None:
        if not noticer.began and args:
            noticed.restored.append(digest_of(args[0]))

    def after_checkpoint(result: Any, args: Any, kwargs: Any) -> None:
        noticed.recomputed.append(bool(kwargs.get("preserve_rng_state", True)))

    places: list[tuple[Any, str, Callable[[Any, Any, Any], None]]] = [
        (torch, "load", after_load),
        (Optimizer, "add_param_group", after_group),
        (nn.Module, "load_state_dict", after_state),
        (torch.optim.lr_scheduler.LRScheduler, "step", after_schedule),
        (torch, "set_rng_state", after_generator),
        (torch.random, "set_rng_state", after_generator),
        (torch.utils.checkpoint, "checkpoint", after_checkpoint),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, after in places:
            original = getattr(owner, name)
            setattr(owner, name, told(original, after, careful))
            stack.callback(setattr, owner, name, original)
        yield


def told(
    original: Callable[..., Any], after: Callable[[Any, Any, Any], None], careful: Callable[[Callable[[], None]], None]
) -> Callable[..., Any]:
    """Return a function that tells of its calls."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if not torch.compiler.is_compiling():
            careful(lambda: after(result, args, kwargs))
        return result

    return call
