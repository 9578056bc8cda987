"""The recorder: what a training run really did, seen through PyTorch's own gates.

No line of the stack is patched. PyTorch lets anyone watch the four gates that every stack passes:

    forward    torch.nn.modules.module.register_module_forward_hook (of all modules)
    backward   torch.autograd.backward, which Tensor.backward calls
    step       torch.optim.optimizer.register_optimizer_step_pre_hook / post_hook (of all optimizers)
    files      the run's own directory, looked through at each update

Inside a recording one thread computes, compiled modules stay eager (inductor costs a minute, and would hide
forwards), and uninitialised memory is filled with NaN, so that a skipped initialisation cannot look healthy.
"""

import contextlib
import io
import logging
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from conformance.recipe import remember_configs

WRAPPER_PARTS = (
    "_forward_module",
    "_original_module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
)
WRAPPER_CLASSES = ("DistributedDataParallel", "DataParallel")  # these call what they wrap ``module``


@dataclass(frozen=True)
class TensorInfo:
    """A parameter or buffer of the trained module."""

    name: str
    """Dotted name without the prefixes of wrappers; of a tied tensor the first."""
    names: tuple[str, ...]
    """All names of the same tensor."""
    shape: tuple[int, ...]
    dtype: torch.dtype
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
    dtype: torch.dtype
    device: str


@dataclass(frozen=True)
class Forward:
    """One call of the outermost module."""

    update: int
    """Updates done before it."""
    ids: Tensor
    """Token ids, (B, T)."""
    logits: Tensor
    """As they left the outermost module: (B, T, V), dtype untouched."""
    training: bool
    grad_enabled: bool
    autocast: torch.dtype | None
    """The dtype of autocast inside the module; None where it was off."""


@dataclass(frozen=True)
class Loss:
    """A tensor on which backward was called."""

    update: int
    value: Tensor
    autocast: bool
    """Whether autocast was on when backward began."""


@dataclass(frozen=True)
class Group:
    """One parameter group, on entry to ``step``."""

    tensors: tuple[str, ...]
    """Names; a tensor that is not in the module is called ``foreign-<n>``."""
    settings: dict[str, Any]
    """lr, betas, weight_decay, ...: plain values; anything else as its repr."""


@dataclass(frozen=True)
class Update:
    """One call of ``Optimizer.step``."""

    optimizer: str
    """Class path."""
    groups: tuple[Group, ...]
    gradients: dict[str, Tensor | None]
    """On entry. None where there was none."""
    before: dict[str, Tensor]
    after: dict[str, Tensor]
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
        """The file called ``name``; for adapters, which know what their stack calls its files.

        Raises:
            FileNotFoundError: if none is called so; the message lists those that were written.
        """
        if self.folder is not None:
            return self.folder / name
        for path in self.files:
            if path.name == name:
                return path
        raise FileNotFoundError(f"no {name} was written at update {self.update}, only {[p.name for p in self.files]}")


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
    """Warnings, log records and lines printed to stdout."""
    changed_configs: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)
    """Optimizer configurations that the stack altered: (as given, as found afterwards)."""
    seconds: float = 0.0

    def checkpoint(self, update: int) -> Checkpoint | None:
        """The files written after ``update`` updates, if any."""
        return next((c for c in self.checkpoints if c.update == update), None)


@contextlib.contextmanager
def record(directory: Path | None = None, zero_gradients: bool = False, rank: int = 0) -> Iterator[Trace]:
    """Record the training run inside the ``with`` block.

    Everything is put back on exit, also after an exception; recordings may be nested or repeated.

    Args:
        directory: where the run writes its files; None: files are not recorded.
        zero_gradients: zero every gradient on entry to ``step``, before anything else sees it.
        rank: only kept in the trace.
    """
    recorder = _Recorder(Trace(rank=rank), directory, zero_gradients)
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        configs = stack.enter_context(remember_configs())
        stack.enter_context(quiet_and_deterministic())
        stack.enter_context(collected_messages(recorder.trace.messages))
        for handle in (
            register_module_forward_pre_hook(recorder.forward_begins),
            register_module_forward_hook(recorder.forward_ends, with_kwargs=True, always_call=True),
            register_optimizer_step_pre_hook(recorder.step_begins),
            register_optimizer_step_post_hook(recorder.step_ends),
        ):
            stack.callback(handle.remove)
        stack.enter_context(wrapped_backward(recorder))
        try:
            yield recorder.trace
        finally:
            recorder.look_for_files()
            recorder.trace.changed_configs = [(given, live) for live, given in configs if live != given]
            recorder.trace.seconds = time.perf_counter() - started


@contextlib.contextmanager
def quiet_and_deterministic() -> Iterator[None]:
    """One thread, no compilation, NaN in uninitialised memory, and the caller's random state unharmed."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined] # set by its module
    with torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined] # as above
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
            torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined] # as above


@contextlib.contextmanager
def collected_messages(messages: list[str]) -> Iterator[None]:
    """Collect warnings, log records and printed lines instead of showing them."""

    class Handler(logging.Handler):
        def emit(self, entry: logging.LogRecord) -> None:
            messages.append(entry.getMessage())

    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    printed = io.StringIO()
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(printed):
        warnings.simplefilter("always")
        root.handlers[:] = [Handler()]
        root.setLevel(logging.INFO)
        try:
            yield
        finally:
            root.handlers[:] = handlers
            root.setLevel(level)
            messages.extend(str(entry.message) for entry in caught)
            messages.extend(line for line in printed.getvalue().splitlines() if line.strip())


@contextlib.contextmanager
def wrapped_backward(recorder: "_Recorder") -> Iterator[None]:
    """Tell the recorder of every call of torch.autograd.backward."""
    original = torch.autograd.backward

    def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
        # Activation checkpointing computes forwards again inside, and may call backward there: not the stack's own.
        outermost, recorder.in_backward = not recorder.in_backward, True
        try:
            if outermost:
                recorder.backward_begins(tensors)
            original(tensors, *args, **kwargs)
        finally:
            recorder.in_backward = not outermost

    torch.autograd.backward = backward
    try:
        yield
    finally:
        torch.autograd.backward = original


class _Recorder:
    """The hooks of one recording, and what they must remember between calls."""

    def __init__(self, trace: Trace, directory: Path | None, zero_gradients: bool) -> None:
        self.trace, self.directory, self.zero_gradients = trace, directory, zero_gradients
        self.root: nn.Module | None = None
        self.calls: list[nn.Module] = []  # modules whose forward is running
        self.in_backward = False
        self.inner_autocast: torch.dtype | None = None
        self.before_forward: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None
        self.pending: dict[int, tuple[dict[str, Tensor], dict[str, Any]]] = {}  # by optimizer: what step_begins saw
        self.foreign: dict[int, tuple[str, Tensor]] = {}  # kept alive, or another tensor might get the same id
        self.seen: dict[Path, tuple[int, int]] = {}
        self.look_for_files(first=True)

    # forward ---------------------------------------------------------------------------------------------------

    def forward_begins(self, module: nn.Module, args: Any) -> None:
        self.calls.append(module)
        if len(self.calls) == 1:
            self.inner_autocast = None
            if self.root is None and any(True for _ in module.parameters()) and not on_meta(module):
                # Before the forward, since a lookup with max_norm changes the table.
                self.before_forward = (copied(named_tensors(module)), copied(named_tensors(module, buffers=True)))
        if torch.is_autocast_enabled(device := device_type(module)):
            self.inner_autocast = torch.get_autocast_dtype(device)

    def forward_ends(self, module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        # NOTE a footgun: after an exception PyTorch calls this as (module, args, None), without the keywords.
        while self.calls and self.calls.pop() is not module:
            pass  # calls that an exception ended without their hook
        if self.calls or self.in_backward or output is None:
            return
        ids, logits = find_ids(args, kwargs), find_logits(output)
        if ids is None or logits is None or logits.is_meta or logits.shape[0] != ids.shape[0]:
            return
        if self.root is None:
            if self.before_forward is None:
                return
            self.root = module
            self.trace.initial, self.trace.buffers = self.before_forward
            self.trace.tensors = describe_tensors(module)
            self.trace.embeddings = describe_embeddings(module)
        self.trace.forwards.append(
            Forward(
                update=len(self.trace.updates),
                ids=copy_of(ids),
                logits=copy_of(logits),
                training=module.training,
                grad_enabled=torch.is_grad_enabled(),
                autocast=self.inner_autocast,
            )
        )

    # backward --------------------------------------------------------------------------------------------------

    def backward_begins(self, tensors: Any) -> None:
        for tensor in [tensors] if isinstance(tensors, Tensor) else tensors:
            if isinstance(tensor, Tensor) and tensor.numel() == 1 and not tensor.is_meta:
                on = torch.is_autocast_enabled(tensor.device.type)
                self.trace.losses.append(Loss(len(self.trace.updates), copy_of(tensor), on))

    # step ------------------------------------------------------------------------------------------------------

    def step_begins(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.look_for_files()
        tensors = self.watched(optimizer)
        names = {id(tensor): name for name, tensor in tensors.items()}
        if self.zero_gradients:
            for tensor in tensors.values():
                if tensor.grad is not None:
                    tensor.grad.zero_()
        device = next((t.device.type for t in tensors.values()), "cpu")
        begun = {
            "optimizer": class_path(optimizer),
            "groups": tuple(describe_group(group, names) for group in optimizer.param_groups),
            "gradients": {name: None if t.grad is None else copy_of(t.grad) for name, t in tensors.items()},
            "before": copied(tensors),
            "state_before": describe_state(optimizer, names),
            "autocast": torch.is_autocast_enabled(device),
        }
        self.pending[id(optimizer)] = (tensors, begun)

    def step_ends(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if id(optimizer) in self.pending:
            tensors, begun = self.pending.pop(id(optimizer))
            state = describe_state(optimizer, {id(tensor): name for name, tensor in tensors.items()})
            self.trace.updates.append(Update(after=copied(tensors), state_after=state, **begun))

    def watched(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """All parameters of the module as it is now, and whatever else the optimizer holds."""
        tensors = {} if self.root is None else named_tensors(self.root)
        known = {id(tensor) for tensor in tensors.values()}
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                if id(tensor) not in known:
                    name, _ = self.foreign.setdefault(id(tensor), (f"foreign-{len(self.foreign) + 1}", tensor))
                    tensors[name] = tensor
        return tensors

    # files -----------------------------------------------------------------------------------------------------

    def look_for_files(self, first: bool = False) -> None:
        """Credit files that are new or changed to the update before."""
        if self.directory is None or not self.directory.is_dir():
            return
        written = []
        for path in sorted(self.directory.rglob("*")):
            if path.is_file():
                stat = path.stat()
                if self.seen.get(path) != (stat.st_mtime_ns, stat.st_size):
                    self.seen[path] = (stat.st_mtime_ns, stat.st_size)
                    written.append(path)
        if written and not first:
            update = len(self.trace.updates)
            earlier = self.trace.checkpoint(update)
            if earlier is not None:
                self.trace.checkpoints.remove(earlier)
                written = [*earlier.files, *(path for path in written if path not in earlier.files)]
            self.trace.checkpoints.append(Checkpoint(update, tuple(written)))


def describe_group(group: dict[str, Any], names: dict[int, str]) -> Group:
    """A parameter group as plain data; state that its class keeps inside is left to describe_state."""
    settings = {k: plain_value(v) for k, v in group.items() if k != "params" and not keyed_by_tensor(v)}
    return Group(tuple(names[id(tensor)] for tensor in group["params"]), settings)


def describe_state(optimizer: Optimizer, names: dict[int, str]) -> dict[str, dict[str, Any]]:
    """Optimizer state by name: from ``optimizer.state``, and from dictionaries by tensor inside the groups."""
    places = [optimizer.state, *(v for group in optimizer.param_groups for v in group.values() if keyed_by_tensor(v))]
    return {
        names[id(tensor)]: {key: plain_value(value) for key, value in entry.items()}
        for place in places
        for tensor, entry in place.items()
        if isinstance(tensor, Tensor) and id(tensor) in names and entry
    }


def keyed_by_tensor(value: Any) -> bool:
    """Whether this is a dictionary with tensors as keys, as grokadamw 0.1.2 keeps its state in a group."""
    return isinstance(value, dict) and any(isinstance(key, Tensor) for key in value)


def find_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The token ids among the arguments: the first integer tensor of two dimensions."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point() and not value.is_meta:
            return value
    return None


def find_logits(output: Any) -> Tensor | None:
    """The logits in a model's output: the first floating tensor of three dimensions, chunks along time joined."""
    if isinstance(output, Tensor):
        return output if output.ndim == 3 and output.is_floating_point() else None
    if isinstance(output, dict):  # Hugging Face's ModelOutput is one
        output = [output["logits"]] if "logits" in output else list(output.values())
    if isinstance(output, list | tuple):
        tensors = [t for t in output if isinstance(t, Tensor) and t.ndim == 3 and t.is_floating_point()]
        if tensors and len(tensors) == len(output):
            return torch.cat(tensors, dim=1)
        return tensors[0] if tensors else None
    return None


def named_tensors(module: nn.Module, buffers: bool = False) -> dict[str, Tensor]:
    """Parameters (or buffers) by their names without the prefixes of wrappers; tied ones under the first."""
    pairs = module.named_buffers() if buffers else module.named_parameters()
    wrappers = wrapper_prefixes(module)
    return {clean_name(name, wrappers): tensor for name, tensor in pairs}


def wrapper_prefixes(module: nn.Module) -> tuple[str, ...]:
    """Names of modules inside ``module`` that only wrap another one and call it ``module``."""
    return tuple(
        f"{name}." if name else "" for name, child in module.named_modules() if type(child).__name__ in WRAPPER_CLASSES
    )


def clean_name(name: str, wrappers: tuple[str, ...]) -> str:
    """A dotted name without the parts that Fabric, torch.compile, DDP, FSDP and checkpointing add."""
    for prefix in sorted(wrappers, key=len, reverse=True):
        if name.startswith(f"{prefix}module."):
            name = prefix + name[len(prefix) + len("module.") :]
    return ".".join(part for part in name.split(".") if part not in WRAPPER_PARTS)


def describe_tensors(module: nn.Module) -> dict[str, TensorInfo]:
    """What there is to know about each parameter, by its first name."""
    owners, wrappers = dict(module.named_modules()), wrapper_prefixes(module)
    names: dict[int, list[str]] = {}
    first: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), [])
        if (clean := clean_name(name, wrappers)) not in names[id(tensor)]:
            names[id(tensor)].append(clean)
        first.setdefault(id(tensor), (name, tensor))
    infos = [
        TensorInfo(
            name=names[key][0],
            names=tuple(names[key]),
            shape=tuple(tensor.shape),
            dtype=tensor.dtype,
            device=str(tensor.device),
            trainable=tensor.requires_grad,
            owner=type(owners[name.rpartition(".")[0]]).__name__,
        )
        for key, (name, tensor) in first.items()
    ]
    return {info.name: info for info in infos}


def describe_embeddings(module: nn.Module) -> tuple[EmbeddingInfo, ...]:
    """What there is to know about each embedding."""
    options = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    wrappers = wrapper_prefixes(module)
    return tuple(
        EmbeddingInfo(
            name=clean_name(name, wrappers),
            kind=class_path(child),
            shape=(child.num_embeddings, child.embedding_dim),
            options=tuple((option, getattr(child, option)) for option in options),
            dtype=child.weight.dtype,
            device=str(child.weight.device),
        )
        for name, child in module.named_modules()
        if isinstance(child, nn.Embedding)
    )


def class_path(thing: Any) -> str:
    """``module.Class`` of an object."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def on_meta(module: nn.Module) -> bool:
    """Whether the module has parameters without memory, as stacks build them to count operations."""
    return any(parameter.is_meta for parameter in module.parameters())


def device_type(module: nn.Module) -> str:
    """``cpu``, ``cuda``, ... of the module's first parameter or buffer; ``cpu`` if it has none."""
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        return "cpu" if tensor.is_meta else tensor.device.type
    first = next(module.parameters(), None)
    return "cpu" if first is None or first.is_meta else first.device.type


def copy_of(tensor: Tensor) -> Tensor:
    """A copy on the CPU, without history."""
    with torch.no_grad():
        dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
        return dense.to("cpu", copy=True)


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of named tensors."""
    return {name: copy_of(tensor) for name, tensor in tensors.items() if not tensor.is_meta}


def plain_value(value: Any) -> Any:
    """A value that can be kept: tensors copied, numbers, text and tuples of them as they are, the rest as repr."""
    if isinstance(value, Tensor):
        return copy_of(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return tuple(plain_value(item) for item in value)
    return repr(value)


def equal_values(first: Any, second: Any) -> bool:
    """Bit equality of two plain values, with NaN equal to itself."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.dtype == second.dtype and first.shape == second.shape and bits_equal(first, second)
    if isinstance(first, tuple) and isinstance(second, tuple):
        return len(first) == len(second) and all(map(equal_values, first, second))
    if isinstance(first, float) and isinstance(second, float) and math.isnan(first) and math.isnan(second):
        return True
    return type(first) is type(second) and bool(first == second)


def bits_equal(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one dtype and shape hold the same values; NaN equals NaN, 0.0 equals -0.0."""
    return bool(((first == second) | ((first != first) & (second != second))).all())
