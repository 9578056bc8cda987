"""The gates of an audit: those of a recording, and what only a run that nobody adapted needs.

A recording switches torch.compile off. An audit must not: the run is the user's. Hooks of modules and modes of
functions would be traced into the graph and compiled a second time when they are removed, so they are taken away as
long as compiled code runs. What happens inside compiled code is therefore not seen, only its call.
"""

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from conformance.auditing.dropout import DROPPING, chance
from conformance.recording.gates import (
    Watcher,
    backward_watched,
    entropies_watched,
    forget,
    making_watched,
    scaler_watched,
)


class AuditWatcher(Watcher, Protocol):
    """What is told of each gate of an audit."""

    def clipped(self, kind: str, parameters: list[Tensor], limit: float, result: Any) -> None:
        """Gradients were clipped."""

    def compiled_call(self) -> None:
        """Compiled code is called."""

    def dropped(self, name: str) -> None:
        """A function of torch's drops with a probability above 0."""

    def beside(self) -> contextlib.AbstractContextManager[None]:
        """Return the gates that belong to no recording."""

    def compiled_function(self, original: Callable[..., Any]) -> None:
        """The forward that has ended was a call of this function, compiled."""


class Gates:
    """Open while a run is recorded."""

    def __init__(self, watcher: AuditWatcher) -> None:
        self.watcher = watcher
        self.stack = contextlib.ExitStack()
        self.handles: list[RemovableHandle] = []
        self.mode = FunctionGate(watcher)
        self.open = False
        self.inside = False  # compiled code is running
        self.eager = False  # the audit's own forwards are: compiled modules run as they were written

    def enter(self) -> None:
        """Open all gates."""
        self.handles = [
            register_module_forward_pre_hook(self.watcher.forward_begins),
            register_module_forward_hook(self.watcher.forward_ends, with_kwargs=True, always_call=True),
        ]
        for handle in (
            register_optimizer_step_pre_hook(self.watcher.step_begins),
            register_optimizer_step_post_hook(self.watcher.step_ends),
        ):
            self.stack.callback(forget, handle)
        for gate in (backward_watched, making_watched, scaler_watched, clipping_watched):
            self.stack.enter_context(gate(self.watcher))
        self.stack.enter_context(entropies_watched(self.watcher.entropy_computed))
        self.stack.enter_context(self.watcher.beside())
        self.stack.enter_context(compiling_watched(self))
        self.mode.__enter__()
        self.open = True

    def close(self) -> None:
        """Close all gates. Not from within a function that PyTorch hands to modes: ours would come back."""
        if not self.open:
            return
        self.open = False
        for handle in self.handles:
            forget(handle)
        lift(self.mode)
        self.stack.close()

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Leave compiled code alone: no hook of a module and no mode of functions inside the block."""
        self.inside = True
        places: list[dict[int, Any]] = [hooks._global_forward_pre_hooks, hooks._global_forward_hooks]
        extra: list[dict[int, Any]] = [
            hooks._global_forward_hooks_with_kwargs,
            hooks._global_forward_hooks_always_called,
        ]
        taken = [
            [(place, handle.id, place.pop(handle.id)) for place in (own, *extra) if handle.id in place]
            for own, handle in zip(places, self.handles, strict=True)
        ]
        lifted = lift(self.mode)
        try:
            yield
        finally:
            self.inside = False
            if self.open:
                for entries in taken:
                    for place, identity, hook in entries:
                        place[identity] = hook
                if lifted:
                    torch._C._push_on_torch_function_stack(self.mode)

    def call_compiled(
        self,
        owner: object,
        call: Callable[..., Any],
        args: Any,
        kwargs: Any,
        original: Callable[..., Any] | None = None,
    ) -> Any:
        """Call compiled code, and tell of the call as if its owner had been called.

        Args:
            owner: module or optimizer whose method was compiled.
            call: what was compiled.
            args: to give to it.
            kwargs: to give to it.
            original: the function that was compiled, where it is no method of the owner.
        """
        if not self.open or self.inside or self.eager:
            return call(*args, **kwargs)
        self.watcher.compiled_call()
        if isinstance(owner, torch.optim.Optimizer):
            self.watcher.step_begins(owner, (owner, *args), kwargs)
        elif isinstance(owner, nn.Module):
            self.watcher.forward_begins(owner, args)
        with self.suspended():
            result = call(*args, **kwargs)
        if isinstance(owner, torch.optim.Optimizer):
            self.watcher.step_ends(owner, (owner, *args), kwargs)
        elif isinstance(owner, nn.Module):
            self.watcher.forward_ends(owner, args, kwargs, result)
            if original is not None:
                self.watcher.compiled_function(original)
        return result


def lift(mode: TorchFunctionMode) -> bool:
    """Take a mode from the stack of this thread, wherever it lies; False if it is not there."""
    above = []
    found = False
    while not found and torch._C._len_torch_function_stack():
        top = torch._C._pop_torch_function_stack()
        found = top is mode
        if not found:
            above.append(top)
    for other in reversed(above):
        torch._C._push_on_torch_function_stack(other)
    return found


class FunctionGate(TorchFunctionMode):
    """Sees functional dropout, and fills fresh memory of modules with NaN, so that a skipped initialisation shows.

    Uninitialised memory holds whatever was there, often zeros: a run that reads it may look healthy on one machine.
    Only memory that a module takes in its constructor or in ``to_empty`` is filled: what a correct program writes
    before it reads.
    """

    FRESH = (torch.empty, torch.empty_like, torch.Tensor.new_empty)

    def __init__(self, watcher: AuditWatcher) -> None:
        super().__init__()
        self.watcher = watcher

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling():  # code that was compiled before the audit began is traced with its modes
            return func(*args, **(kwargs or {}))
        if func in self.FRESH:
            fresh = func(*args, **(kwargs or {}))
            if isinstance(fresh, Tensor) and fresh.is_floating_point() and not fresh.is_meta and for_a_module():
                with torch.no_grad():
                    fresh.fill_(torch.nan)
            return fresh
        if func in DROPPING and chance(func, args, kwargs or {}) > 0:
            self.watcher.dropped(func.__name__)
        return func(*args, **(kwargs or {}))


def for_a_module() -> bool:
    """Return True if a module's constructor, or ``to_empty``, is among the callers."""
    frame = sys._getframe(2)
    for _ in range(6):
        if frame.f_code.co_name in ("__init__", "to_empty") and isinstance(frame.f_locals.get("self"), nn.Module):
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


@contextlib.contextmanager
def clipping_watched(watcher: Watcher) -> Iterator[None]:
    """Tell of each clipping of gradients by PyTorch's own functions."""
    originals: dict[str, Any] = {}

    def telling(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        kind = "norm" if "norm" in name else "value"

        signature = inspect.signature(original)

        @functools.wraps(original)
        def clip(*args: Any, **kwargs: Any) -> Any:
            try:
                call = signature.bind(*args, **kwargs)
            except TypeError:
                return original(*args, **kwargs)  # PyTorch's own error is the right one
            parameters, limit = list(call.arguments.values())[:2]
            # A generator that was used up already clips nothing: it stays one, and we see what it gives.
            given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
            call.arguments["parameters"] = given
            result = original(*call.args, **call.kwargs)
            watcher.clipped(kind, given, limit, result)  # type: ignore[attr-defined] # an AuditWatcher's
            return result

        return clip

    for name in ("clip_grad_norm_", "clip_grad_value_"):
        originals[name] = getattr(torch.nn.utils, name)
        for place in (torch.nn.utils, torch.nn.utils.clip_grad):
            setattr(place, name, telling(name, originals[name]))
    try:
        yield
    finally:
        for name, original in originals.items():
            for place in (torch.nn.utils, torch.nn.utils.clip_grad):
                setattr(place, name, original)


@contextlib.contextmanager
def compiling_watched(gates: Gates) -> Iterator[None]:
    """Tell of each call of compiled code, and keep the gates out of it."""
    original = torch.compile
    undo: list[Callable[[], None]] = []
    frames = sys.modules.get("torch._dynamo.eval_frame")
    if frames is not None:  # a module may be compiled already
        undo.append(watch_calls(frames.OptimizedModule, gates))

    @functools.wraps(original)
    def watched_compile(model: Any = None, *args: Any, **kwargs: Any) -> Any:
        made = original(model, *args, **kwargs)
        if model is None:
            return made  # a decorator, which calls torch.compile again
        if isinstance(made, nn.Module):
            if not undo:
                undo.append(watch_calls(type(made), gates))
            return made
        return quiet(made, model, gates)

    torch.compile = watched_compile  # type: ignore[assignment] # of the same signature
    try:
        yield
    finally:
        torch.compile = original
        for action in undo:
            action()


def quiet(made: Callable[..., Any], model: Any, gates: Gates) -> Callable[..., Any]:
    """Return a compiled function that tells of its calls."""
    method_of = getattr(model, "__self__", None)

    @functools.wraps(made)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # inside other compiled code: no trace of us, and no guard
            return model(*args, **kwargs)
        owner = method_of or model_in(model, args, kwargs)
        return gates.call_compiled(owner, made, args, kwargs, None if method_of else model)

    return call


def model_in(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module | None:
    """Return the largest module that a compiled function is given, or that it refers to."""
    inside = [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if holds_something(cell)]
    names = getattr(getattr(function, "__code__", None), "co_names", ())
    inside += [function.__globals__[name] for name in names if name in getattr(function, "__globals__", {})]
    found = [value for value in (*args, *kwargs.values(), *inside) if isinstance(value, nn.Module)]
    return max(found, key=lambda module: sum(1 for _ in module.parameters()), default=None)


def holds_something(cell: Any) -> bool:
    """Return True if a cell of a closure has a content yet."""
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def watch_calls(kind: type[nn.Module], gates: Gates) -> Callable[[], None]:
    """Tell of each call of a compiled module; return a function that undoes this."""
    original = kind.__call__

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return gates.call_compiled(self, functools.partial(original, self), args, kwargs)

    kind.__call__ = call  # type: ignore[method-assign] # put back

    def undo() -> None:
        kind.__call__ = original  # type: ignore[method-assign] # as it was

    return undo
