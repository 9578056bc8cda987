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
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from conformance.recipe import remember_configs
from conformance.recording.isolation import collected_messages, quiet_and_deterministic
from conformance.recording.snapshot import (
    class_path,
    clean_name,
    copied,
    copy_of,
    describe_embeddings,
    describe_group,
    describe_state,
    describe_tensors,
    device_type,
    find_ids,
    find_logits,
    named_tensors,
    on_meta,
    same_parameters,
    wrapper_prefixes,
)
from conformance.recording.trace import Checkpoint, Forward, Loss, Trace, Update


@contextlib.contextmanager
def recording(directory: Path | None, zero_gradients: bool, rank: int, nan_gradient: int | None) -> Iterator[Trace]:
    """Record the training run inside a ``with`` block; see :func:`conformance.record`."""
    recorder = Recorder(Trace(rank=rank), directory, zero_gradients, nan_gradient)
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
            stack.callback(forget, handle)
        stack.enter_context(wrapped_backward(recorder))
        try:
            yield recorder.trace
        finally:
            recorder.look_for_files()
            recorder.trace.changed_configs = [(given, live) for live, given in configs if live != given]
            recorder.trace.seconds = time.perf_counter() - started


@contextlib.contextmanager
def wrapped_backward(recorder: "Recorder") -> Iterator[None]:
    """Tell the recorder of every call of torch.autograd.backward."""
    original = torch.autograd.backward

    def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
        # Activation checkpointing computes forwards again inside, and may call backward there: not the stack's own.
        outermost, recorder.in_backward = not recorder.in_backward, True
        try:
            if outermost:
                recorder.backward_begins(tensors)
            original(tensors, *args, **kwargs)
            if outermost:
                recorder.backward_ends()
        finally:
            recorder.in_backward = not outermost

    torch.autograd.backward = backward
    try:
        yield
    finally:
        torch.autograd.backward = original


def forget(handle: RemovableHandle) -> None:
    """Remove a global hook, and what torch 2.11 to 2.13 leave behind of one that was registered with_kwargs.

    With that left, torch.compile warns of global hooks as long as the process lives.
    """
    handle.remove()
    torch.nn.modules.module._global_forward_hooks_with_kwargs.pop(handle.id, None)


class Recorder:
    """The hooks of one recording, and what they must remember between calls."""

    def __init__(
        self, trace: Trace, directory: Path | None, zero_gradients: bool, nan_gradient: int | None = None
    ) -> None:
        self.trace, self.directory = trace, directory
        self.zero_gradients, self.nan_gradient = zero_gradients, nan_gradient
        self.root: nn.Module | None = None
        self.calls: list[nn.Module] = []  # modules whose forward is running
        self.in_backward = False
        self.inner_autocast: torch.dtype | None = None
        self.inner: tuple[nn.Module, Tensor, Tensor] | None = None  # the last call inside with ids in and logits out
        self.before_forward: dict[str, Tensor] | None = None  # copies of parameters and buffers, by full name
        self.stepping: list[Optimizer] = []  # optimizers whose step is running
        self.pending: tuple[dict[str, Tensor], dict[str, Any]] | None = None  # what was seen when the step began
        self.foreign: dict[int, tuple[str, Tensor]] = {}  # kept alive, or another tensor might get the same id
        self.seen: dict[Path, tuple[int, int]] = {}
        self.look_for_files(first=True)

    # forward ---------------------------------------------------------------------------------------------------

    def forward_begins(self, module: nn.Module, args: Any) -> None:
        self.calls.append(module)
        if len(self.calls) == 1:
            self.inner_autocast = self.inner = None
            if self.root is None and any(True for _ in module.parameters()) and not on_meta(module):
                # Before the forward, since a lookup with max_norm changes the table.
                parameters, buffers = (
                    f(remove_duplicate=False) for f in (module.named_parameters, module.named_buffers)
                )
                self.before_forward = copied({**dict(parameters), **dict(buffers)})
        if torch.is_autocast_enabled(device := device_type(module)):
            self.inner_autocast = torch.get_autocast_dtype(device)

    def forward_ends(self, module: nn.Module, args: Any, kwargs: Any = None, output: Any = None) -> None:
        # NOTE a footgun: after an exception PyTorch calls this as (module, args, None), without the keywords. An output
        # of None is no exception: under DDP Lightning's validation_step is a forward, and mostly returns nothing.
        while self.calls and self.calls.pop() is not module:
            pass  # calls that an exception ended without their hook
        if self.in_backward or kwargs is None:
            return
        ids = find_ids(args, kwargs)
        logits = None if ids is None and self.calls else find_logits(output)
        prefix = ""
        if self.calls:
            if ids is not None and logits is not None:
                self.inner = module, ids, logits
            return
        if logits is None and self.inner is not None:
            # A wrapper that computes the loss too. What it calls is the model if it holds all that is trained: an
            # embedding also takes ids and gives something of three dimensions.
            inner, ids, logits = self.inner
            if inner is not self.root and not same_parameters(inner, module):
                return
            prefix = next(f"{name}." for name, child in module.named_modules() if child is inner)
            module = inner
        self.inner = None
        if ids is None or logits is None or logits.is_meta or logits.shape[0] != ids.shape[0]:
            return
        if self.root is None:
            if self.before_forward is None:
                return
            self.root, wrappers = module, wrapper_prefixes(module)
            before = {
                clean_name(name.removeprefix(prefix), wrappers): tensor
                for name, tensor in self.before_forward.items()
                if name.startswith(prefix)
            }
            self.trace.initial = {name: before[name] for name in named_tensors(module) if name in before}
            self.trace.buffers = {name: before[name] for name in named_tensors(module, buffers=True) if name in before}
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
                inside=bool(prefix),
            )
        )

    # backward --------------------------------------------------------------------------------------------------

    def backward_begins(self, tensors: Any) -> None:
        for tensor in [tensors] if isinstance(tensors, Tensor) else tensors:
            if isinstance(tensor, Tensor) and tensor.numel() == 1 and not tensor.is_meta:
                on = torch.is_autocast_enabled(tensor.device.type)
                self.trace.losses.append(Loss(len(self.trace.updates), copy_of(tensor), on))

    def backward_ends(self) -> None:
        if self.nan_gradient == len(self.trace.updates) and self.root is not None:
            gradient = next(p.grad for p in self.root.parameters() if p.grad is not None)
            gradient[(0,) * gradient.ndim] = torch.nan

    # step ------------------------------------------------------------------------------------------------------

    def step_begins(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if optimizer in self.stepping:  # an exception ended its last step without the hook
            del self.stepping[self.stepping.index(optimizer) :]
        self.stepping.append(optimizer)
        if len(self.stepping) > 1:
            return None  # what ZeroRedundancyOptimizer, say, wraps: its step is part of one that is noted already
        self.look_for_files()
        self.note(optimizer)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if not callable(closure):
            return None
        closure = self.noting(closure, optimizer)
        return ((*args[:1], closure, *args[2:]), kwargs) if len(args) > 1 else (args, kwargs | {"closure": closure})

    def noting(self, closure: Callable[..., Any], optimizer: Optimizer) -> Callable[..., Any]:
        """Return the closure, with a note taken when it first ends.

        Lightning computes forward, backward and clipping inside the closure that it gives to step: on entry the
        gradients are still those of the update before.
        """
        first = True

        def noted(*args: Any, **kwargs: Any) -> Any:
            nonlocal first
            result = closure(*args, **kwargs)
            if first:
                self.note(optimizer)
            first = False
            return result

        return noted

    def note(self, optimizer: Optimizer) -> None:
        """Keep what the step starts from."""
        tensors = self.watched(optimizer)
        names = {id(tensor): name for name, tensor in tensors.items()}
        if self.zero_gradients:
            for tensor in tensors.values():
                if tensor.grad is not None:
                    tensor.grad.zero_()
        device = next((t.device.type for t in tensors.values()), "cpu")
        begun = {
            "optimizer": tuple(map(class_path, type(optimizer).__mro__)),
            "groups": tuple(describe_group(group, names) for group in optimizer.param_groups),
            "gradients": {name: None if t.grad is None else copy_of(t.grad) for name, t in tensors.items()},
            "before": copied(tensors),
            "state_before": describe_state(optimizer, names),
            "autocast": torch.is_autocast_enabled(device),
        }
        self.pending = tensors, begun

    def step_ends(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer not in self.stepping:
            return
        del self.stepping[self.stepping.index(optimizer) :]
        if not self.stepping and self.pending is not None:
            (tensors, begun), self.pending = self.pending, None
            state = describe_state(optimizer, {id(tensor): name for name, tensor in tensors.items()})
            self.trace.updates.append(Update(after=copied(tensors), state_after=state, **begun))

    def watched(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """Return all parameters of the module as it is now, and whatever else the optimizer holds."""
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
