"""Which of the modules that a run calls is the model, and what goes into it and comes out.

The model (the root) is known when an optimizer first steps: the smallest module that was called with token ids and
holds all that is trained. Calls before that are kept as candidates. It is never a bare embedding, which takes ids too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from conformance.recording.gates import direct_forward, owner_of_call, when_returned
from conformance.recording.snapshot import (
    clean_name,
    describe_embeddings,
    describe_tensors,
    device_type,
    find_ids,
    find_logits,
    holds,
    named_tensors,
    on_meta,
    same_parameters,
    unwrapped,
    wrapper_prefixes,
)
from conformance.recording.trace import Forward, Measures, Named, Trace
from conformance.recording.weights import Weights


@dataclass
class Inner:
    """A call inside the outermost one that took ids and gave logits."""

    module: nn.Module
    ids: Tensor
    logits: Tensor


@dataclass
class Call:
    """An outermost call of a module."""

    module: nn.Module
    update: int
    evaluation: int
    before: dict[str, Tensor] | None
    """Parameters and buffers before the call, by full name; None if the root is known already."""
    measured: Measures | None = None
    frame: FrameType | None = None
    """Of ``forward``, if it was called directly."""
    ids: Tensor | None = None
    inner: Inner | None = None
    autocast: torch.dtype | None = None
    linears: dict[nn.Module, torch.dtype] = field(default_factory=dict)
    rounded: list[nn.Module] = field(default_factory=list)
    owner: nn.Module | None = None
    """The module in whose method it was called, if it is a part of that one."""


def gives_hidden_states(module: nn.Module, output: Tensor) -> bool:
    """Return True if what a module gives is as wide as its embeddings, of which none has as many rows.

    Under a tied head, the body of a model holds all of its parameters, as the model does.
    """
    tables = [part for part in module.modules() if isinstance(part, nn.Embedding)]
    width = output.shape[-1]
    return any(t.embedding_dim == width for t in tables) and all(t.num_embeddings != width for t in tables)


def holds_16_bits(value: object) -> bool:
    """Return True for a float32 tensor of many values that are all bfloat16 numbers: they were rounded before.

    A few different values may be such numbers by nature, as ones and zeros are.
    """
    if type(value) is not Tensor or value.dtype != torch.float32 or value.is_meta or value.numel() < 64:
        return False
    value = value.detach()
    return torch.equal(value, value.bfloat16().float()) and len(value.unique()) > 16


@dataclass
class Candidate:
    """A finished call that may be one of the model's."""

    call: Call
    module: nn.Module
    """Which takes ids, and gives logits if any leave it."""
    prefix: str
    """Its name inside the outermost module, with a dot."""
    forward: Forward


def likeliness(candidate: Candidate) -> tuple[bool, int, int]:
    """Return how much speaks for a candidate: a frozen teacher is larger than the model, and is not trained."""
    parameters = list(candidate.module.parameters())
    return candidate.forward.grad_enabled, sum(p.requires_grad for p in parameters), len(parameters)


class Calls:
    """The calls of one recording."""

    def __init__(self, trace: Trace, weights: Weights) -> None:
        self.trace, self.weights = trace, weights
        self.root: nn.Module | None = None
        self.running: list[nn.Module] = []
        self.call: Call | None = None  # the outermost call that is running
        self.candidates: list[Candidate] = []  # until the root is known
        self.last: tuple[nn.Module, Any, Any] | None = None  # the last training call: module, args, keywords
        self.devices: dict[nn.Module, str] = {}  # of the modules called in this update, under autocast
        self.wholes: dict[nn.Module, bool] = {}  # whether a module called in this update is the model
        self.by_parts = False  # no call of the root is seen, only those of its parts

    def tensors(self) -> dict[str, Tensor]:
        """Return the parameters of the model by name, or of the likeliest candidate as long as it is not known."""
        if self.root is not None:
            return named_tensors(self.root)
        found = [candidate for candidate in self.candidates if not isinstance(candidate.module, nn.Embedding)]
        return named_tensors(max(found, key=likeliness).module) if found else {}

    def begins(self, module: nn.Module, update: int, evaluation: int = 0) -> None:
        """Note that a module is called, in this evaluation of a closure."""
        if not self.running:
            direct = direct_forward(module)
            if direct is None:
                self.start(module, update, evaluation)
            elif self.call is None or self.call.frame is not direct[1]:
                owner, frame = direct
                seen = when_returned(frame, partial(self.returned, owner, dict(frame.f_locals)))
                self.start(owner if seen else module, update, evaluation, frame if seen else None)
        self.running.append(module)
        self.see_autocast(module)

    def start(self, module: nn.Module, update: int, evaluation: int, frame: FrameType | None = None) -> None:
        """Begin an outermost call. A copy of all tensors is taken now: a lookup with max_norm changes the table."""
        before = measured = None
        if self.root is None and any(True for _ in module.parameters()) and not on_meta(module):
            tensors = dict(module.named_parameters(remove_duplicate=False))
            before = self.weights.keep({**tensors, **dict(module.named_buffers(remove_duplicate=False))})
            measured = self.weights.measure(tensors)
        self.call = Call(module, update, evaluation, before, measured, frame)

    def see_autocast(self, module: nn.Module) -> None:
        """Note the dtype of autocast."""
        assert self.call is not None
        # Asking for any autocast first is quick; the device of each module is not.
        if torch._C._is_any_autocast_enabled():
            if module not in self.devices:
                self.devices[module] = device_type(module)
            if torch.is_autocast_enabled(device := self.devices[module]):
                self.call.autocast = torch.get_autocast_dtype(device)

    def returned(self, module: nn.Module, inputs: dict[str, Any], output: Any) -> None:
        """Note that a forward which was called directly has returned."""
        self.running.clear()
        if self.call is not None and self.call.module is module:
            arguments = {name: value for name, value in inputs.items() if name != "self"}
            self.finish(module, (), arguments, output)

    def ends(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Note that a call has ended; ``kwargs`` is None after an exception."""
        while self.running and self.running.pop() is not module:
            pass  # calls that an exception ended without their hook
        if self.call is None or kwargs is None:
            if not self.running and kwargs is None and self.call is not None and self.call.module is module:
                self.call = None
            return
        if isinstance(module, nn.Linear) and isinstance(output, Tensor):
            self.call.linears[module] = output.dtype
            if self.root is None and self.weights.keeps_logits and args and holds_16_bits(args[0]):
                self.call.rounded.append(module)
        if self.call.module is module and not self.running:
            self.finish(module, args, kwargs, output)
            return
        ids = find_ids(args, kwargs)
        if ids is not None:
            if self.call.ids is None:
                self.call.ids = ids
            logits = find_logits(output, self.weights.keeps_logits)
            if logits is not None:
                self.call.inner = Inner(module, ids, logits)

    def finish(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Keep an outermost call that takes ids, if it may be one of the model's."""
        call, self.call = self.call, None
        assert call is not None
        ids = find_ids(args, kwargs)
        logits = find_logits(output, self.weights.keeps_logits)
        prefix, inside, model = "", False, module
        if (
            logits is None
            and call.inner is not None
            and same_parameters(call.inner.module, module)
            and not gives_hidden_states(call.inner.module, call.inner.logits)
        ):  # A wrapper that computes the loss too.
            model, ids, logits, inside = call.inner.module, call.inner.ids, call.inner.logits, True
            prefix = next((f"{name}." for name, part in module.named_modules() if part is model), "")
            prefix = "" if model is module else prefix
        call.inner = None  # its output would stay in memory as long as the call does
        ids = call.ids if ids is None else ids
        if ids is None or ids.is_meta or (logits is not None and (logits.is_meta or len(logits) != len(ids))):
            return
        if self.root is None and call.before is None:
            return
        if self.root is not None and not self.is_models(module):
            if not (
                self.by_parts and isinstance(module, nn.Embedding) and any(m is module for m in self.root.modules())
            ):
                return
            logits, model = None, self.root
        parts = dict(model.named_modules())
        names, wrappers = {part: name for name, part in parts.items()}, wrapper_prefixes(parts)
        training = unwrapped(model).training
        other = [clean_name(name, wrappers) for part, name in names.items() if part.training != training and name]
        forward = Forward(
            update=call.update,
            evaluation=call.evaluation,
            ids=self.weights.keep_small(ids),
            logits=None if logits is None else self.weights.keep_logits(logits),
            training=training,
            grad_enabled=torch.is_grad_enabled(),
            autocast=call.autocast,
            inside=inside,
            other_mode=tuple(other),
            linears={clean_name(names[part], wrappers): kind for part, kind in call.linears.items() if part in names},
            rounded=tuple(clean_name(names[part], wrappers) for part in call.rounded if part in names),
        )
        if forward.training and forward.grad_enabled:
            self.last = module, args, kwargs
        if self.root is not None:
            self.trace.forwards.append(forward)
        else:
            part = logits is None or isinstance(model, nn.Embedding)
            call.owner = owner_of_call(module) if part else None
            self.candidates.append(Candidate(call, model, prefix, forward))

    def is_models(self, module: nn.Module) -> bool:
        """Return True if a module is the model, or wraps it, or holds all that is trained of it."""
        assert self.root is not None
        if module not in self.wholes and any(part is self.root for part in module.modules()):  # found at once, mostly
            self.wholes[module] = True
        if module not in self.wholes:
            trained = {id(tensor) for tensor in self.root.parameters() if tensor.requires_grad}
            self.wholes[module] = holds(module, trained)
        return self.wholes[module]

    def update_ends(self) -> None:
        """Forget what may be otherwise in the next update: what is frozen, and where modules are."""
        self.devices.clear()
        self.wholes.clear()

    def choose_root(self, owned: set[int]) -> None:
        """Choose the model among the candidates, once, and keep what is known of it.

        Args:
            owned: identities of the tensors that the optimizer which steps first owns; empty at the end of a recording
                in which none stepped.
        """
        if self.root is not None or not self.candidates:
            return

        def fitness(candidate: Candidate) -> tuple[int, bool, int]:
            """How much of what is trained it holds, whether it gives logits, and how small it is."""
            module = candidate.call.module
            parameters = list(module.parameters())
            held = sum(id(tensor) in owned for tensor in parameters)
            return held, candidate.forward.logits is not None, -sum(tensor.numel() for tensor in parameters)

        bare = [candidate for candidate in self.candidates if isinstance(candidate.module, nn.Embedding)]
        fitting = [candidate for candidate in self.candidates if candidate not in bare] or (bare if not owned else [])
        candidates, self.candidates = self.candidates, []
        if not fitting:
            owner = next((c.call.owner for c in candidates if c.call.owner and holds(c.call.owner, owned)), None)
            if owner is not None and owned:
                self.take_owner(owner, candidates)
            return
        best = max(fitting, key=fitness) if len(fitting) > 1 else fitting[0]
        module = best.module
        self.root, wrappers = module, wrapper_prefixes(dict(module.named_modules()))
        same = (c for c in candidates if same_parameters(c.call.module, best.call.module))
        first = next(c for c in same if c.call.before is not None)

        def own(kept: Mapping[str, Tensor]) -> Named[Tensor]:
            """What was kept of the outermost module's tensors, by the names that they have inside the model."""
            inside = {name.removeprefix(first.prefix): t for name, t in kept.items() if name.startswith(first.prefix)}
            return Named({clean_name(name, wrappers): tensor for name, tensor in inside.items()})

        known, parameters = own(first.call.before or {}), named_tensors(module)
        self.trace.initial = Named({name: known[name] for name in parameters if name in known})
        self.trace.buffers = {name: known[name] for name in named_tensors(module, buffers=True) if name in known}
        if (measured := first.call.measured) is not None:
            self.trace.measured_initial = Measures(own(measured.norms), own(measured.bits))
        self.trace.tensors = describe_tensors(module)
        self.trace.embeddings = describe_embeddings(module)
        self.trace.forwards += [c.forward for c in candidates if self.is_models(c.call.module)]

    def take_owner(self, owner: nn.Module, candidates: list[Candidate]) -> None:
        """Take for the model a module that no call of its own showed, such as one whose training_step calls its parts.

        No step was done yet, so its parameters are as they were at the start.
        """
        self.root, self.by_parts = owner, True
        self.trace.initial = self.weights.keep(named_tensors(owner))
        self.trace.measured_initial = self.weights.measure(named_tensors(owner))
        self.trace.buffers = self.weights.keep(named_tensors(owner, buffers=True))
        self.trace.tensors = describe_tensors(owner)
        self.trace.embeddings = describe_embeddings(owner)
        for candidate in candidates:
            if candidate.call.owner is owner:
                forward = replace(candidate.forward, logits=None, training=owner.training, other_mode=())
                self.trace.forwards.append(forward)
