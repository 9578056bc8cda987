"""The recorder: what a training run really did, seen through PyTorch's own gates (conformance.recording.gates).

Inside a recording one thread computes, compiled modules stay eager (inductor costs a minute, and would hide
forwards), and uninitialised memory is filled with NaN, so that a skipped initialisation cannot look healthy.
"""

import contextlib
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from conformance.choice import remember_configs
from conformance.recipe import Dropping, collect_reports
from conformance.recording import metrics
from conformance.recording.calls import Calls
from conformance.recording.dropping import everything_kept
from conformance.recording.files import Files
from conformance.recording.gates import watched
from conformance.recording.inner import Inner, Worker
from conformance.recording.isolation import collected_messages, quiet_and_deterministic
from conformance.recording.loggers import Loggers
from conformance.recording.masters import Masters
from conformance.recording.opened import Open, in_step, joined
from conformance.recording.snapshot import (
    class_path,
    describe_group,
    named_tensors,
)
from conformance.recording.trace import CrossEntropy, Loss, Named, Step, Trace, Update
from conformance.recording.unseen import Shadow, find_unseen, watch_step
from conformance.recording.weights import Weights, Whole


@contextlib.contextmanager
def recording(
    directory: Path | None,
    zero_gradients: bool,
    rank: int,
    nan_gradient: int | None,
    keep: Path | None,
    dropping: Dropping = "everywhere",
) -> Iterator[Trace]:
    """Record the training run inside a ``with`` block; see :func:`conformance.record`."""
    recorder = Recorder(Trace(rank=rank), Files(directory, keep), Whole(), zero_gradients, nan_gradient)
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        configs = stack.enter_context(remember_configs())
        reports = stack.enter_context(collect_reports())
        stack.enter_context(quiet_and_deterministic())
        stack.enter_context(collected_messages(recorder.trace.messages))
        recorder.loggers = Loggers(recorder.trace.messages.append)
        stack.callback(recorder.loggers.leave)
        stack.enter_context(watched(recorder))
        if dropping == "nowhere":
            stack.enter_context(everything_kept())
        elif dropping == "at one place":
            stack.enter_context(everything_kept(but_for=lambda: recorder.done))
        try:
            yield recorder.trace
        finally:
            recorder.end()
            recorder.trace.changed_configs = [(given, live) for live, given in configs if live != given]
            recorder.trace.messages.extend(filter(None, (metrics.line(*report) for report in reports)))
            recorder.trace.seconds = time.perf_counter() - started


class Recorder:
    """The gates of one recording, and what must be remembered between them."""

    def __init__(
        self,
        trace: Trace,
        files: Files,
        weights: Weights,
        zero_gradients: bool = False,
        nan_gradient: int | None = None,
    ) -> None:
        self.trace, self.files, self.weights, self.calls = trace, files, weights, Calls(trace, weights)
        self.zero_gradients, self.nan_gradient = zero_gradients, nan_gradient
        self.masters = Masters(flat_only=not weights.keeps_logits)
        self.loggers: Loggers | None = None
        self.in_backward = False
        self.training = False  # a module was called, or a backward has begun
        self.backwards = 0  # since an optimizer stepped
        self.open: Open | None = None
        self.stepping: list[Optimizer] = []  # optimizers whose step is running
        self.numbers: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()  # in order of first steps
        self.numbered = 0
        self.again = False  # the optimizer that steps has stepped in the last update already
        self.evaluations = 0  # of the closure of the step that is running
        self.begun: tuple[Worker, dict[str, Tensor]] | None = None  # the step that is running, and the tensors by name
        self.inner = Inner(weights)
        self.shadow: Shadow | None = None  # of the model after a backward, until a step was seen
        self.step_seen = False
        self.made = self.looked = False  # an optimizer of torch's; and for others, before the first step
        self.undo: list[Callable[[], None]] = []
        self.foreign: dict[int, tuple[str, Tensor]] = {}  # kept alive, or another tensor might get the same id

    @property
    def done(self) -> int:
        """Updates done. One whose optimizers may step still counts as soon as one of them has."""
        return len(self.trace.updates) + bool(self.open and self.open.steps)

    def close(self) -> None:
        """Finish the update that is open, if an optimizer has stepped in it."""
        self.settle()
        if self.open is not None and self.open.steps:
            own = ("steps", "optimizers", "stepped", "late")
            found = {name: value for name, value in vars(self.open).items() if name not in own}
            self.trace.updates.append(Update(steps=tuple(self.open.steps), **found))
        self.open = None

    def settle(self) -> None:
        """Keep what the model's tensors are after a step that moved master copies: by now they are copied back."""
        if self.open is not None and self.open.late:
            late, self.open.late = self.open.late, {}
            self.open.after |= self.weights.keep(late)
            self.open.measured_after = joined(self.open.measured_after, self.weights.measure(late))

    def end(self) -> None:
        """Finish the recording."""
        self.look_for_unseen_steps()
        for undo in self.undo:
            undo()
        self.trace.messages.extend(metrics.lines(self.files.directory))
        self.files.credit(self.trace, self.done)
        self.calls.choose_root(set())
        self.close()

    # forward and loss ------------------------------------------------------------------------------------------

    def forward_begins(self, module: nn.Module, args: Any) -> None:
        self.training = True
        if not self.in_backward:
            if not self.calls.running and not self.stepping:
                self.settle()
            if self.shadow is not None and not self.calls.running:
                self.look_for_unseen_steps()  # now, before a lookup with max_norm changes the table
            self.calls.begins(module, self.done, self.evaluations if self.stepping else 0)

    def forward_ends(self, module: nn.Module, args: Any, kwargs: Any = None, output: Any = None) -> None:
        # NOTE a footgun: after an exception PyTorch calls this as (module, args, None), without the keywords. An output
        # of None is no exception: under DDP Lightning's validation_step is a forward, and mostly returns nothing.
        if not self.in_backward:
            self.calls.ends(module, args, kwargs, output)

    def entropy_computed(self, name: str, arguments: dict[str, Any], value: Tensor) -> None:
        if not self.in_backward and (found := describe_entropy(arguments, value, self.done, self.weights)) is not None:
            self.trace.entropies.append(found)

    # backward --------------------------------------------------------------------------------------------------

    def backward_begins(self, tensors: Any) -> None:
        self.training = True
        if not self.stepping:
            self.close()
        if self.loggers is not None:
            self.loggers.look()
        self.backwards += 1
        for tensor in [tensors] if isinstance(tensors, Tensor) else tensors:
            if isinstance(tensor, Tensor) and tensor.numel() == 1:
                on = torch.is_autocast_enabled(tensor.device.type)
                self.trace.losses.append(Loss(self.done, self.weights.keep_small(tensor), on))
        self.in_backward = True

    def backward_ends(self) -> None:
        self.in_backward = False
        if self.nan_gradient == self.done:
            self.spoil(self.calls.tensors().values())
        if not self.step_seen and not self.stepping:
            self.watch_unseen()
            self.shadow = Shadow(self.calls.tensors(), self.weights)

    def spoil(self, tensors: Iterable[Tensor]) -> None:
        """Put a NaN into the first gradient of these tensors, if it is for this update and no optimizer has stepped."""
        if self.nan_gradient != self.done or (self.open is not None and self.open.steps):
            return
        gradient = next((t.grad for t in tensors if t.grad is not None), None)
        if gradient is not None:
            gradient[(0,) * gradient.ndim] = torch.nan

    def optimizer_made(self) -> None:
        self.made = True

    def watch_unseen(self) -> None:
        """Look for optimizers of another family before they first step, if none of torch's was made. (It is slow.)"""
        if self.made or self.looked:
            return
        self.looked = True
        undone = [watch_step(it, self.step_begins, self.step_ends) for it in find_unseen(self.calls.tensors().values())]
        self.undo += filter(None, undone)

    def look_for_unseen_steps(self) -> None:
        """Notice that the parameters have changed since the last backward although no step was seen."""
        shadow, self.shadow = self.shadow, None
        if shadow is None or self.step_seen or not shadow.differs(self.calls.tensors()):
            self.shadow = shadow if not self.step_seen else None
            return
        tensors = self.calls.tensors()
        found = find_unseen(tensors.values())
        if self.made and not found:  # SAM moves the weights between two backward passes, before the optimizer steps
            return
        self.calls.choose_root({id(tensor) for tensor in tensors.values() if tensor.requires_grad})
        names = {id(tensor): name for name, tensor in tensors.items()}
        self.open = Open(
            before=shadow.values,
            gradients=shadow.gradients,
            after=self.weights.keep(tensors),
            measured_gradients=shadow.measured_gradients,
            measured_before=shadow.measured,
            measured_after=self.weights.measure(tensors),
        )
        self.calls.update_ends()
        for optimizer in found or [None]:
            kinds = () if optimizer is None else tuple(map(class_path, type(optimizer).__mro__))
            groups = [] if optimizer is None else optimizer.param_groups
            held = [{**group, "params": [t for t in group["params"] if id(t) in names]} for group in groups]
            self.open.steps.append(Step(kinds, tuple(describe_group(group, names) for group in held), autocast=False))
            if optimizer is not None:
                undo = watch_step(optimizer, self.step_begins, self.step_ends)
                self.undo += [undo] if undo is not None else []
                self.step_seen = undo is not None
        if not found:
            self.trace.notes.append(
                "The parameters changed, but the suite saw no optimizer step: the optimizer must derive from "
                "torch.optim.Optimizer, or have param_groups and step()."
            )
        self.backwards = 0

    # step ------------------------------------------------------------------------------------------------------

    def step_begins(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if optimizer in self.stepping:  # an exception ended its last step without the hook
            del self.stepping[self.stepping.index(optimizer) :]
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if not callable(closure) and self.trains_nothing(optimizer):
            return None
        self.stepping.append(optimizer)
        if len(self.stepping) > 1:  # what another one wraps: its step is part of one that is noted already
            if self.begun is not None:
                self.inner.begins(self.worker(optimizer, self.begun[1]))
            return None
        if self.in_backward:  # which has not ended, but the gradients of this optimizer are there
            self.spoil(tensor for group in optimizer.param_groups for tensor in group["params"])
        self.files.credit(self.trace, self.done)
        # ZeRO steps its optimizer once for each group, with the others taken out of it: that is no second step.
        self.again = self.open is not None and not self.open.stepped.isdisjoint(in_step(optimizer))
        if self.again:
            self.close()
        self.evaluations = 0
        if not callable(closure):
            self.note(optimizer)
            return None
        if self.open is None or not self.open.steps:
            self.note(optimizer)  # otherwise the closure decides whether this is another update
        closure = self.noting(closure, optimizer)
        return ((*args[:1], closure, *args[2:]), kwargs) if len(args) > 1 else (args, kwargs | {"closure": closure})

    def trains_nothing(self, optimizer: Optimizer) -> bool:
        """Return True for a step that is not an update: one before any forward, or at a rate of 0 without a backward.

        Such a step allocates state (DeepSpeed at its start, torch.distributed.checkpoint before it gathers or loads
        state), or tries the optimizer out.
        """
        if not self.training:
            return True
        # An update whose rate is 0, as a warm-up may begin: its second optimizer, or ZeRO's second group, is no trial.
        alone = self.open is None or not self.open.steps or not self.open.stepped.isdisjoint(in_step(optimizer))
        if self.backwards or not alone:
            return False
        # Asked last: to read a rate that is a tensor on the GPU, the host must wait for it.
        rates = [group.get("lr") for group in optimizer.param_groups]
        return all(isinstance(rate, float | int | Tensor) and float(rate) == 0 for rate in rates)

    def noting(self, closure: Callable[..., Any], optimizer: Optimizer) -> Callable[..., Any]:
        """Return the closure, with a note taken when it first ends.

        Lightning computes forward, backward and clipping inside the closure that it gives to step: on entry the
        gradients are still those of the update before. LBFGS calls it several times in one step.
        """

        def noted(*args: Any, **kwargs: Any) -> Any:
            result = closure(*args, **kwargs)
            self.evaluations += 1
            if self.evaluations == 1:
                if self.backwards:
                    self.close()
                self.note(optimizer)
            return result

        return noted

    def note(self, optimizer: Optimizer) -> None:
        """Keep what the step starts from."""
        self.calls.choose_root({id(tensor) for group in optimizer.param_groups for tensor in group["params"]})
        tensors = self.watched(optimizer)
        names = {id(tensor): name for name, tensor in tensors.items()}
        self.inner = Inner(self.weights)
        if self.zero_gradients:
            masters = [tensor for group in optimizer.param_groups for tensor in group["params"]]
            for tensor in (*tensors.values(), *masters):
                if tensor.grad is not None:
                    tensor.grad.zero_()
        if self.open is None or not self.open.steps:
            self.open = Open()
        else:  # another optimizer of the same update: each tensor's gradient is the one that its own optimizer finds
            own = {names[id(t)] for group in self.masters.seen(optimizer).param_groups for t in group["params"]}
            tensors = {name: t for name, t in tensors.items() if name in own or name not in self.open.before}
        given = self.masters.gradients(optimizer)
        found = {name: given.get(id(t), t.grad) for name, t in tensors.items()}
        gradients = {name: gradient for name, gradient in found.items() if gradient is not None}
        self.open.before = Named({**self.weights.keep(tensors), **self.open.before})
        self.open.gradients.update({**dict.fromkeys(tensors), **self.weights.keep(gradients)})
        if not self.trace.updates:  # later, it is what the update before left
            self.open.measured_before = joined(self.weights.measure(tensors), self.open.measured_before)
        measured = self.weights.measure(gradients, bits=False)
        self.open.measured_gradients = joined(self.open.measured_gradients, measured)
        self.begun = self.worker(optimizer, tensors), tensors

    def worker(self, optimizer: Optimizer, tensors: dict[str, Tensor]) -> Worker:
        """Return what an optimizer starts its step from."""
        names = {id(tensor): name for name, tensor in tensors.items()}
        seen = self.masters.seen(optimizer)
        device = next((t.device.type for t in tensors.values()), "cpu")
        step = Step(
            optimizer=tuple(map(class_path, type(optimizer).__mro__)),
            groups=tuple(describe_group(group, names) for group in seen.param_groups),
            autocast=torch.is_autocast_enabled(device),
            in_backward=self.in_backward,
            number=self.number_of(optimizer),
        )
        return Worker(optimizer, step, self.weights.keep_state(seen, names))

    def number_of(self, optimizer: Optimizer) -> int:
        """Return which optimizer of the run it is; 0 for one that cannot be told apart by identity."""
        with contextlib.suppress(TypeError):  # an optimizer of another family need not allow weak references
            if optimizer not in self.numbers:
                self.numbers[optimizer], self.numbered = self.numbered, self.numbered + 1
            return self.numbers[optimizer]
        return 0

    def step_ends(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer not in self.stepping:
            return
        del self.stepping[self.stepping.index(optimizer) :]
        if not self.stepping:
            self.finish(optimizer)
        elif self.begun is not None:
            self.inner.ends(self.begun[1])

    def step_left_out(self, optimizer: Optimizer) -> None:
        self.note(optimizer)
        self.finish(optimizer, skipped=True)

    def finish(self, optimizer: Optimizer, skipped: bool = False) -> None:
        """Keep what a step has ended with."""
        if self.begun is None or self.open is None:
            return
        (outer, tensors), self.begun = self.begun, None
        names = {id(tensor): name for name, tensor in tensors.items()}
        now = self.weights.keep(tensors)
        self.open.after |= now
        self.open.measured_after = joined(self.open.measured_after, self.weights.measure(tensors))
        if held := self.masters.of(optimizer):
            self.open.late |= tensors
            self.trace.shares |= self.masters.shares(names)
            finer = {names[id(p.tensor)]: p.of(p.master) for p in held if p.master.dtype != p.tensor.dtype}
            self.open.masters |= self.weights.keep(finer)
        self.open.stepped |= in_step(optimizer)
        ended = {"evaluations": self.evaluations, "skipped": skipped}
        for worker in self.inner.all_done(outer, now):
            self.open.state_before |= worker.state
            self.open.state_after |= self.weights.keep_state(self.masters.seen(worker.optimizer), names)
            self.open.steps.append(Step(**{**vars(worker.step), **ended}))
            self.open.optimizers.append(worker.optimizer)
        self.calls.update_ends()
        self.step_seen, self.shadow = True, None
        if self.again and not self.backwards:
            self.open.unfounded = True
            name = type(optimizer).__name__
            self.trace.notes.append(f"{name} stepped again after update {self.done - 1} with no backward in between.")
        self.again, self.backwards = False, 0

    def watched(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """Return all parameters of the model as it is now, and whatever else the optimizer holds."""
        tensors = {} if self.calls.root is None else named_tensors(self.calls.root)
        known = {id(tensor) for tensor in tensors.values()}
        if tensors:
            self.masters.look(optimizer, tensors)
        for group in optimizer.param_groups:
            for tensor in self.masters.held_by(group):
                if id(tensor) not in known:
                    name, _ = self.foreign.setdefault(id(tensor), (f"foreign-{len(self.foreign) + 1}", tensor))
                    tensors[name] = tensor
                    known.add(id(tensor))
        return tensors


def describe_entropy(arguments: dict[str, Any], value: Tensor, update: int, weights: Weights) -> CrossEntropy | None:
    """Return what is kept of a cross entropy; None if its targets are no token ids."""
    targets = arguments["target"]
    if not isinstance(targets, Tensor) or targets.is_floating_point() or value.is_meta:
        return None
    return CrossEntropy(
        update=update,
        targets=weights.keep_small(targets).flatten(),
        ignore_index=arguments["ignore_index"],
        reduction=arguments["reduction"],
        label_smoothing=arguments.get("label_smoothing", 0.0),
        dtype=value.dtype,
        value=weights.keep_small(value),
        grad_enabled=torch.is_grad_enabled(),
    )
