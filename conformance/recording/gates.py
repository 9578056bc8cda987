"""The gates that every PyTorch run passes, and how each is watched.

    forward         torch.nn.modules.module.register_module_forward_pre_hook / forward_hook (of all modules)
    cross entropy   torch._C._nn.cross_entropy_loss and nll_loss_nd, which torch.nn.functional calls; a mode of
                    functions would be asked for every operation and every attribute of a tensor
    backward        torch.autograd.backward, which Tensor.backward calls, and torch.autograd.grad
    step            torch.optim.optimizer.register_optimizer_step_pre_hook / post_hook (of all optimizers)
    optimizers      torch.optim.Optimizer.__init__
    scaler          torch.amp.GradScaler.step, which may leave a step out

No line of the stack is changed, and everything is put back when a recording ends.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle


class Watcher(Protocol):
    """What is told of each gate."""

    def forward_begins(self, module: nn.Module, args: Any) -> None:
        """A module is called."""

    def forward_ends(self, module: nn.Module, args: Any, kwargs: Any = None, output: Any = None) -> None:
        """The call has ended; ``kwargs`` is None after an exception."""

    def entropy_computed(self, name: str, arguments: dict[str, Any], value: Tensor) -> None:
        """A cross entropy was computed."""

    def backward_begins(self, tensors: Any) -> None:
        """The outermost backward begins at these tensors."""

    def backward_ends(self) -> None:
        """The outermost backward has ended."""

    def optimizer_made(self) -> None:
        """An optimizer of torch's family is made."""

    def step_begins(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """An optimizer steps; other arguments may be given to it instead."""

    def step_ends(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """The step has ended."""

    def step_left_out(self, optimizer: Optimizer) -> None:
        """A gradient scaler did not call the optimizer's step."""


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Tell ``watcher`` of all gates inside the block."""
    with contextlib.ExitStack() as stack:
        for handle in (
            register_module_forward_pre_hook(watcher.forward_begins),
            register_module_forward_hook(watcher.forward_ends, with_kwargs=True, always_call=True),
            register_optimizer_step_pre_hook(watcher.step_begins),
            register_optimizer_step_post_hook(watcher.step_ends),
        ):
            stack.callback(forget, handle)
        stack.enter_context(backward_watched(watcher))
        stack.enter_context(making_watched(watcher))
        stack.enter_context(scaler_watched(watcher))
        stack.enter_context(entropies_watched(watcher.entropy_computed))
        yield


def forget(handle: RemovableHandle) -> None:
    """Remove a global hook, and what torch 2.11 to 2.13 leave behind of one that was registered with_kwargs.

    With that left, torch.compile warns of global hooks as long as the process lives.
    """
    handle.remove()
    torch.nn.modules.module._global_forward_hooks_with_kwargs.pop(handle.id, None)


NATIVE = {"cross_entropy_loss": "cross_entropy", "nll_loss_nd": "nll_loss"}
"""Functions of torch._C._nn, and those of torch.nn.functional that call them."""
ARGUMENTS = ("input", "target", "weight", "reduction", "ignore_index", "label_smoothing")
REDUCTIONS = ("none", "mean", "sum")


@contextlib.contextmanager
def entropies_watched(tell: Callable[[str, dict[str, Any], Tensor], None]) -> Iterator[None]:
    """Tell of every cross entropy that torch.nn.functional computes."""
    natives: Any = torch._C._nn
    originals = {native: getattr(natives, native) for native in NATIVE}

    def telling(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            # By position, as torch.nn.functional calls it; a call of somebody else's that is otherwise is not seen.
            if isinstance(result, Tensor) and len(args) >= 5 and args[3] in range(3):
                arguments = dict(zip(ARGUMENTS, args, strict=False))
                tell(name, arguments | {"reduction": REDUCTIONS[args[3]]}, result)
            return result

        return call

    for native, name in NATIVE.items():
        setattr(natives, native, telling(name, originals[native]))
    try:
        yield
    finally:
        for native, original in originals.items():
            setattr(natives, native, original)


WITHOUT_CONTENT = ("FakeTensor", "FunctionalTensor")
"""Classes of the tensors with which torch.compile traces a backward."""


def has_content(tensors: Any) -> bool:
    """Return False for a backward that trains nothing: LitGPT counts its FLOPs by one on the meta device."""
    given = [tensors] if isinstance(tensors, Tensor) else tensors
    return not any(
        isinstance(tensor, Tensor) and (tensor.is_meta or type(tensor).__name__ in WITHOUT_CONTENT) for tensor in given
    )


@contextlib.contextmanager
def backward_watched(watcher: Watcher) -> Iterator[None]:
    """Tell of every outermost call of torch.autograd.backward and torch.autograd.grad."""
    originals: tuple[Any, Any] = torch.autograd.backward, torch.autograd.grad
    inside = False

    def telling(original: Callable[..., Any], first: str) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            # Activation checkpointing computes forwards again inside, and may call backward there: not the stack's own.
            nonlocal inside
            tensors = args[0] if args else kwargs.get(first, ())
            if isinstance(tensors, Iterator):  # it gives them once, and PyTorch needs them, too
                tensors = list(tensors)
                args, kwargs = ((tensors, *args[1:]), kwargs) if args else (args, {**kwargs, first: tensors})
            if not inside and not has_content(tensors):
                return original(*args, **kwargs)
            outermost, inside = not inside, True
            try:
                if outermost:
                    watcher.backward_begins(tensors)
                result = original(*args, **kwargs)
                if outermost:
                    watcher.backward_ends()
                return result
            finally:
                inside = not outermost

        return call

    torch.autograd.backward = telling(originals[0], "tensors")
    torch.autograd.grad = telling(originals[1], "outputs")
    try:
        yield
    finally:
        torch.autograd.backward, torch.autograd.grad = originals


@contextlib.contextmanager
def making_watched(watcher: Watcher) -> Iterator[None]:
    """Tell of every optimizer that is made."""
    original = Optimizer.__init__

    @functools.wraps(original)
    def init(self: Optimizer, *args: Any, **kwargs: Any) -> None:
        watcher.optimizer_made()
        original(self, *args, **kwargs)

    Optimizer.__init__ = init  # type: ignore[method-assign]  # a gate, and put back
    try:
        yield
    finally:
        Optimizer.__init__ = original  # type: ignore[method-assign]  # a gate, and put back


@contextlib.contextmanager
def scaler_watched(watcher: Watcher) -> Iterator[None]:
    """Tell of steps that a gradient scaler leaves out because a gradient is not finite."""
    scaler: Any = torch.amp.GradScaler
    original = scaler._maybe_opt_step

    def maybe(self: Any, optimizer: Optimizer, optimizer_state: Any, *args: Any, **kwargs: Any) -> Any:
        called = sum(float(found) for found in optimizer_state["found_inf_per_device"].values()) == 0
        result = original(self, optimizer, optimizer_state, *args, **kwargs)
        if not called:
            watcher.step_left_out(optimizer)
        return result

    scaler._maybe_opt_step = maybe
    try:
        yield
    finally:
        scaler._maybe_opt_step = original


def direct_forward(child: nn.Module) -> tuple[nn.Module, FrameType] | None:
    """Return the module, and its frame, whose ``forward`` was called directly and now calls ``child``, if there is one.

    ``model.forward(x)`` passes no hook of the model, only those of its parts. Called from a hook of the child.
    """
    frame: FrameType | None = sys._getframe(1)
    for _ in range(24):
        if frame is None:
            return None
        if frame.f_code.co_name == "forward":
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and module is not child:
                return module, frame
        frame = frame.f_back
    return None


def owner_of_call(child: nn.Module) -> nn.Module | None:
    """Return the outermost module among the callers that holds ``child``, as a LightningModule in training_step."""
    frame: FrameType | None = sys._getframe(1)
    found = None
    for _ in range(24):
        if frame is None:
            break
        module = frame.f_locals.get("self") if "self" in frame.f_code.co_varnames[:1] else None
        if isinstance(module, nn.Module) and module is not child and any(part is child for part in module.modules()):
            found = module
        frame = frame.f_back
    return found


def when_returned(frame: FrameType, ended: Callable[[Any], None]) -> bool:
    """Call ``ended`` with what the function of ``frame`` returns; False if that cannot be seen beside a debugger."""
    if sys.gettrace() is not None:
        return False

    def watch(seen: FrameType, event: str, value: Any) -> Any:
        if event == "return":
            sys.settrace(None)
            ended(value)
        return watch

    frame.f_trace, frame.f_trace_lines = watch, False
    sys.settrace(lambda *_: None)  # switches tracing on; new frames are not traced
    return True
