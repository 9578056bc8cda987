"""What an audit does at each gate of a run: record it, note what only an audit looks for, and end in time."""

import functools
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from conformance.auditing.dropout import chances_of
from conformance.auditing.entropies import describe_input
from conformance.auditing.facts import Backward, Call, Clip, Facts, fetch
from conformance.auditing.gates import Gates
from conformance.auditing.noticed import Noticer, digest_of, noticing
from conformance.auditing.probe import probe
from conformance.recording.calls import likeliness
from conformance.recording.files import Files
from conformance.recording.loggers import Loggers
from conformance.recording.recorder import Recorder
from conformance.recording.snapshot import describe_tensors, named_tensors
from conformance.recording.weights import Sketch, local, norms, offset_of

MANY_NODES = 500_000
DESCRIBED = 4
"""Cross entropies of one backward pass whose input is looked at."""


class Stopped(BaseException):
    """Ends a run whose updates are recorded. Not an Exception: a script that catches those would go on."""


def careful(gate: Callable[..., Any]) -> Callable[..., Any]:
    """Return a gate that never harms the run: an error of the audit's own ends the recording, and is told."""

    @functools.wraps(gate)
    def guarded(self: "Auditor", *args: Any, **kwargs: Any) -> Any:
        if self.over or self.gates.inside:  # torch.compile itself calls autograd, on tensors without content
            return None
        if transforming():
            return None
        try:
            with torch._C.DisableTorchFunction():  # the audit's own mode would be asked for each attribute of a tensor
                return gate(self, *args, **kwargs)
        except Exception:
            self.broken, self.over = traceback.format_exc(), True
            return None

    return guarded


def transforming() -> bool:
    """Return True inside a transform of torch.func, such as grad or vmap: tensors have no content to look at there."""
    return torch._C._functorch.peek_interpreter_stack() is not None


class Auditor:
    """The audit of one process."""

    def __init__(self, asked: int, stops: bool, finished: Callable[[Facts], None]) -> None:
        """Begin.

        Args:
            asked: updates to record.
            stops: end the run then; otherwise it goes on and nothing is watched any more.
            finished: is called with the facts when they are complete, once.
        """
        self.facts = Facts(asked=asked)
        self.sketch = Sketch()
        self.recorder = Recorder(self.facts.trace, Files(None, None), self.sketch)
        self.gates = Gates(self)
        self.stops = stops
        self.finished: Callable[[Facts], None] | None = finished
        self.loggers: Loggers | None = None
        self.over = False
        self.broken = ""
        self.noticer = Noticer(self.facts.noticed)
        self.leaves: list[Tensor] = []
        self.registered: set[int] | None = None
        self.ended_step: float | None = None
        self.idle = [0, 0]

    @property
    def done(self) -> int:
        """Updates done."""
        return self.recorder.done

    # the end ---------------------------------------------------------------------------------------------------

    def finish(self, ran: bool = True) -> None:
        """Complete the facts and hand them over, once; where it can be done, run the model for what it depends on."""
        finished, self.finished = self.finished, None
        if finished is None:
            return
        recorder, facts = self.recorder, self.facts
        try:
            if not self.broken:
                self.look_at_end()
                self.over = True
                recorder.end()
                if ran and recorder.calls.last is not None and recorder.calls.root is not None:
                    self.gates.eager = True
                    facts.probed = probe(recorder.calls.root, Call(*recorder.calls.last), facts)
                    self.gates.eager = False
                fetch(facts)
        except Exception:
            self.broken = traceback.format_exc()
        self.over, self.leaves, recorder.calls.last = True, [], None
        self.gates.close()
        finished(facts)

    def look_at_end(self) -> None:
        """Note how the model is at the end of the recording."""
        root, facts = self.recorder.calls.root, self.facts
        facts.idle = self.idle[0], self.idle[1]
        if root is None:
            return
        facts.model = f"{type(root).__module__}.{type(root).__qualname__}".removeprefix("__main__.")
        facts.tied_at_end = {name: info.names for name, info in describe_tensors(root).items()}
        tensors = named_tensors(root)
        held = self.noticer.held()  # also by an optimizer that steps in other updates, as those of a GAN do
        if facts.trace.measured_initial is not None:
            self.noticer.compare_with_loads(tensors, facts.trace.measured_initial.bits)
        self.noticer.keep_promises(tensors)
        facts.sharded = {name for name, tensor in tensors.items() if is_sharded(tensor)}
        facts.offsets = {
            name: offset_of(tensors[name]) for name in facts.sharded if hasattr(tensors[name], "placements")
        }
        facts.device = next((tensor.device.type for tensor in tensors.values()), "cpu")
        known = {id(tensor) for tensor in tensors.values()}
        owned = {id(t) for optimizer in self.optimizers for group in optimizer.param_groups for t in group["params"]}
        owned |= held
        facts.foreign_leaves = [tuple(leaf.shape) for leaf in self.leaves if id(leaf) not in known | owned]

    @property
    def optimizers(self) -> list[Optimizer]:
        """Those that stepped in the update that is open."""
        return [] if self.recorder.open is None else self.recorder.open.optimizers

    # forward ---------------------------------------------------------------------------------------------------

    def forward_begins(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():  # code that was compiled before the audit began is traced with its hooks
            return
        if not transforming() and self.enough(module):
            self.finish()
            if self.stops:
                raise Stopped
        self.see_forward(module, args)

    def enough(self, module: nn.Module) -> bool:
        """Return True if all updates are recorded and the next begins.

        A run may print the loss of an update, evaluate or save after its step: so the recording ends with the first
        training forward after it.
        """
        return (
            not self.over
            and self.done >= self.facts.asked
            and not self.recorder.in_backward
            and not self.recorder.stepping
            and torch.is_grad_enabled()
            and not self.recorder.calls.running
        )

    @careful
    def see_forward(self, module: nn.Module, args: Any) -> None:
        calls = self.recorder.calls
        if self.recorder.in_backward:
            return
        if not calls.running:
            self.look_at_device()
            self.noticer.evaluated(module, self.stepped)
            watched = self.done == 0 and module.training and torch.is_grad_enabled()
            self.registered = {id(part) for part in module.modules()} if watched else None
        elif self.registered is not None and id(module) not in self.registered and torch.is_grad_enabled():
            for name, tensor in module.named_parameters():
                if tensor.requires_grad:
                    self.facts.unregistered[f"{type(module).__name__}.{name}"] = type(module).__name__
                    break
        self.recorder.forward_begins(module, args)

    @careful
    def dropped(self, name: str) -> None:
        self.noticer.dropped(name, self.recorder.calls.running)

    def beside(self) -> AbstractContextManager[None]:
        """Return the gates of what is noticed beside the recording."""
        return noticing(self.noticer, lambda action: careful(lambda _: action())(self))

    def forward_ends(self, module: nn.Module, args: Any, kwargs: Any = None, output: Any = None) -> None:
        if not torch.compiler.is_compiling():
            self.see_output(module, args, kwargs, output)

    @careful
    def see_output(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before = self.recorder.calls.last
        self.recorder.forward_ends(module, args, kwargs, output)
        last = self.recorder.calls.last
        if last is not None and last is not before:
            self.noticer.called(last[0], last[1], last[2], self.sketch)

    @careful
    def entropy_computed(self, name: str, arguments: dict[str, Any], value: Tensor) -> None:
        before = len(self.recorder.trace.entropies)
        self.recorder.entropy_computed(name, arguments, value)
        if len(self.recorder.trace.entropies) > before:
            given, backward = self.facts.given, len(self.facts.backwards)
            # LitGPT computes a thousand of them in an update, in chunks of 128 tokens.
            many = len(given) >= DESCRIBED and getattr(given[-DESCRIBED], "backward", None) == backward
            given.append(describe_input(name, arguments["input"], backward, not many))

    def compiled_call(self) -> None:
        self.facts.compiled = True

    @careful
    def compiled_function(self, original: Callable[..., Any]) -> None:
        if self.recorder.calls.last is not None:
            _, args, kwargs = self.recorder.calls.last
            self.recorder.calls.last = original, args, kwargs  # type: ignore[assignment] # called like a module

    # backward --------------------------------------------------------------------------------------------------

    @careful
    def backward_begins(self, tensors: Any) -> None:
        given = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        if not any(isinstance(tensor, Tensor) and tensor.numel() == 1 for tensor in given):
            self.recorder.in_backward = True
            return
        fresh = self.recorder.backwards == 0 and not self.recorder.stepping
        self.recorder.backward_begins(tensors)
        facts = self.facts
        self.look_at_device()
        self.noticer.backward_begins(self.recorder, facts.backwards, fresh)
        if fresh and self.done > 0:
            owned = {id(t) for update in self.last_owned() for t in update}
            left = {
                n: t.grad for n, t in self.recorder.calls.tensors().items() if t.grad is not None and id(t) in owned
            }
            facts.leftovers[self.done] = dict(norms(plain(left)))
        if self.loggers is not None:
            self.loggers.look()
        if not facts.backwards:
            self.look_at_model(given)
        losses = [self.sketch.keep_small(t) for t in given if isinstance(t, Tensor) and t.numel() == 1]
        facts.backwards.append(Backward(self.done, losses))

    def last_owned(self) -> Iterator[list[Tensor]]:
        """Yield the tensors of each optimizer that stepped in the update before."""
        for optimizer in self.stepped:
            yield [tensor for group in optimizer.param_groups for tensor in group["params"]]

    stepped: tuple[Optimizer, ...] = ()

    def look_at_model(self, losses: list[Tensor]) -> None:
        """Look, once, at what the first loss depends on and how the model stands."""
        calls, facts = self.recorder.calls, self.facts
        found = [candidate for candidate in calls.candidates if not isinstance(candidate.module, nn.Embedding)]
        module = calls.root or (max(found, key=likeliness).call.module if found else None)
        tensors = calls.tensors()
        leaves = leaves_of(losses)
        if leaves is not None and tensors:
            names = {id(tensor): name for name, tensor in tensors.items()}
            facts.leaves = {names[id(leaf)] for leaf in leaves if id(leaf) in names}
            self.leaves = [leaf for leaf in leaves if id(leaf) not in names]
        if module is None:
            return
        facts.connected = dist.is_available() and dist.is_initialized()
        for name, part in module.named_modules():
            if chances_of(part):
                facts.dropout[name or type(part).__name__] = part.training
            facts.normalises_batch |= isinstance(part, nn.modules.batchnorm._BatchNorm)
        kinds = {base.__name__ for part in module.modules() for base in type(part).__mro__}
        known = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DataParallel", "DeepSpeedEngine")
        facts.wrappers = tuple(name for name in known if name in kinds)
        self.noticer.begin(module)
        facts.seed = torch.initial_seed()
        facts.generators["cpu"] = digest_of(torch.get_rng_state())
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            facts.generators["cuda"] = digest_of(torch.cuda.get_rng_state())

    def look_at_device(self) -> None:
        """Ask whether the GPU has something to do; it never waits for it."""
        if self.done > 0 and torch.cuda.is_available() and torch.cuda.is_initialized():
            self.idle[0] += torch.cuda.current_stream().query()
            self.idle[1] += 1

    @careful
    def backward_ends(self) -> None:
        self.recorder.backward_ends()
        if self.facts.backwards:
            found = {n: t.grad for n, t in self.recorder.calls.tensors().items() if t.grad is not None}
            self.facts.backwards[-1].norms = norms(plain(found))

    @careful
    def optimizer_made(self) -> None:
        self.recorder.optimizer_made()

    @careful
    def clipped(self, kind: str, parameters: list[Tensor], limit: float, result: Any) -> None:
        names = {id(tensor): name for name, tensor in self.recorder.calls.tensors().items()}
        given = tuple(names.get(id(tensor), "another tensor") for tensor in parameters)
        norm = self.sketch.keep_small(result) if isinstance(result, Tensor) else None
        self.facts.clips.append(Clip(self.done, self.recorder.backwards, given, float(limit), kind, norm))

    # step ------------------------------------------------------------------------------------------------------

    @careful
    def step_begins(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        self.look_at_device()
        new = optimizer not in self.recorder.numbers
        self.sketch.states = self.done in (0, self.facts.asked - 1) or new
        return self.recorder.step_begins(optimizer, args, kwargs)

    @careful
    def step_ends(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        done = self.done
        self.recorder.step_ends(optimizer, args, kwargs)
        self.stepped = tuple(self.optimizers)
        rate = getattr(optimizer, "defaults", {}).get("lr")
        if isinstance(rate, float) and rate not in self.facts.made_with:
            self.facts.made_with += (rate,)
        if self.done > done:
            now = time.perf_counter()
            if self.ended_step is not None:
                self.facts.seconds.append(now - self.ended_step)
            self.ended_step = now

    @careful
    def step_left_out(self, optimizer: Optimizer) -> None:
        self.recorder.step_left_out(optimizer)


def leaves_of(losses: list[Tensor]) -> list[Tensor] | None:
    """Return the leaves that losses depend on; None where the graph hides them, as reentrant checkpointing does."""
    found, seen = [], set[Any]()
    waiting = [loss.grad_fn for loss in losses if loss.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward" or len(seen) > MANY_NODES:
            return None
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            found.append(leaf)
        waiting += [after for after, _ in node.next_functions if after is not None]
    return found


def plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return gradients as norms can be taken of them."""
    return {name: local(tensor) for name, tensor in tensors.items()}


def is_sharded(tensor: Tensor) -> bool:
    """Return True if this process holds a part of the tensor only."""
    placements = getattr(tensor, "placements", ())
    return type(tensor).__name__ == "FlatParameter" or any(place.is_shard() for place in placements)
