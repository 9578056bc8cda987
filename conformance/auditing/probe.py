"""The audit's own forwards, after the last recorded update: what a logit depends on.

They run on two sequences of the last training batch, without gradients and with dropout off; compiled modules run as
they were written, and modes, buffers and generators are put back. Where the parts of a model lie on several processes
they are not run: a process that calls a collective alone waits for ever.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from conformance.auditing.dropout import DROPPING, dropout_off, without_chance
from conformance.auditing.entropies import describe_input
from conformance.auditing.facts import Call, Facts, Given, Probed
from conformance.recording.gates import entropies_watched
from conformance.recording.recorder import describe_entropy
from conformance.recording.snapshot import find_ids, find_logits
from conformance.recording.trace import CrossEntropy
from conformance.recording.weights import Whole

ROWS = 2
# Relative to the largest logit. The same call twice shows 0 on the CPU and in eager mode on GPUs; a fused kernel in 16
# bits may sum in another order if other rows differ. What truly depends on a token moves by 1e-2 and more.
BOUND = 1e-3


def probe(root: nn.Module, call: Call, facts: Facts) -> Probed:
    """Run the model on altered copies of a batch."""
    if facts.sharded or "FullyShardedDataParallel" in facts.wrappers:
        return Probed(unseen="the model is sharded over several processes")
    if "DeepSpeedEngine" in facts.wrappers:
        return Probed(unseen="the audit cannot run a model that DeepSpeed runs")
    ids = find_ids(call.args, call.kwargs)
    if ids is None or ids.size(1) < 4:
        return Probed(unseen="the audit saw no token ids among the arguments of the model")
    last = facts.trace.all_training_forwards()
    kind = last[-1].autocast if last else None
    try:
        with surroundings(root, ids.device.type, kind):
            return altered_runs(call, ids)
    except torch.OutOfMemoryError:
        return Probed(unseen="there was too little memory for another forward")
    except Exception as error:
        return Probed(unseen=f"the model raised {type(error).__name__} when the audit called it with two sequences")


class Unseen(Exception):
    """Why nothing can be said."""


@contextlib.contextmanager
def surroundings(root: nn.Module, device: str, autocast: torch.dtype | None) -> Iterator[None]:
    """No gradients, no dropout, nothing compiled, the run's autocast; buffers and generators are put back."""
    kept = [(buffer, buffer.detach().clone()) for buffer in root.buffers() if not buffer.is_meta]
    devices = [torch.cuda.current_device()] if device == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        torch.autocast(device, dtype=autocast or torch.bfloat16, enabled=autocast is not None),
        dropout_off(root),
    ):
        try:
            yield
        finally:
            for buffer, content in kept:
                buffer.copy_(content)


def altered_runs(call: Call, ids: Tensor) -> Probed:
    """Compare the logits of a batch with those of altered ones."""
    rows = min(ROWS, ids.size(0))
    module = bare(call.module)
    inputs = Inputs()

    def logits(altered: Tensor) -> Tensor | None:
        args, kwargs = replaced(call.args, ids, altered, rows), replaced(call.kwargs, ids, altered, rows)
        return run(module, args, kwargs, inputs)

    batch = ids[:rows].clone()
    first = logits(batch)
    entropies = tuple((entropy, given, batch) for entropy, given in inputs.found)
    if first is None or first.size(0) != rows:
        unseen = "the model returns no logits, and computes no cross entropy inside"
        return Probed(entropies=entropies, unseen=unseen)
    try:
        return replace(compared(logits, batch, first), entropies=entropies)
    except Unseen as reason:
        return Probed(entropies=entropies, unseen=str(reason))


def compared(logits: Callable[[Tensor], Any], batch: Tensor, before: Tensor) -> Probed:
    """Compare the logits of a batch, which are given, with those of altered ones."""
    rows = len(batch)
    scale = before.abs().max().clamp_min(1e-12)
    if not bool(((logits(batch) - before).abs() <= BOUND / 10 * scale).all()):
        raise Unseen("two equal calls of the model gave different logits")
    half = batch.size(1) // 2
    other = (batch + 1) % (int(batch.max()) + 1)
    if bool((other == batch).all()):
        raise Unseen("all tokens of the batch are the same")
    later = batch.clone()
    later[:, half:] = other[:, half:]
    moved = moves(before, logits(later), scale)[:, :half].any(0).nonzero().flatten()
    mixes = None
    if rows > 1:
        neighbour = batch.clone()
        neighbour[1] = other[1]
        mixes = bool(moves(before, logits(neighbour), scale)[0].any())
    earlier = batch.clone()
    earlier[:, :half] = other[:, :half]
    # From half on: where the loss is computed inside, the last position may have no target, and no logit is seen.
    uses = bool(moves(before, logits(earlier), scale * 1e-3)[:, half:].any())
    place = int(moved[0]) if len(moved) else -1
    return Probed(looks_ahead=place, rows_mix=mixes, uses_context=uses)


def moves(before: Tensor, after: Tensor, scale: Tensor) -> Tensor:
    """Return which logits changed: (rows, positions)."""
    return ((after - before).abs() > BOUND * scale).any(-1)


class Inputs:
    """Hears of the cross entropies of a forward."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.found: list[tuple[CrossEntropy, Given | None]] = []

    def entropy_computed(self, name: str, arguments: dict[str, Any], value: Tensor) -> None:
        entropy = describe_entropy(arguments, value, 0, Whole())
        if entropy is not None and isinstance(arguments["input"], Tensor):
            self.seen.append(arguments["input"])
            self.found.append((entropy, describe_input(name, arguments["input"], 0)))


class DryGate(TorchFunctionMode):
    """Lets no function of torch's drop anything."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in DROPPING:
            args, kwargs = without_chance(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def run(module: Callable[..., Any], args: Any, kwargs: Any, inputs: Inputs) -> Tensor | None:
    """Return the logits of a call, in float32; of a model that gives only its loss, what cross entropy was given."""
    inputs.seen.clear()
    with DryGate(), entropies_watched(inputs.entropy_computed):
        output = module(*args, **kwargs)
    found = find_logits(output)
    if found is not None:
        return found.float()
    rows, seen = find_ids(args, kwargs), inputs.seen
    if len(seen) == 1 and rows is not None and seen[0].ndim == 2 and len(seen[0]) % len(rows) == 0:
        return seen[0].float().reshape(len(rows), -1, seen[0].size(-1))
    return None


def replaced(value: Any, ids: Tensor, altered: Tensor, rows: int) -> Any:
    """Return arguments with other token ids, and every other tensor of the batch cut to as many rows."""
    if value is ids:
        return altered
    if isinstance(value, Tensor):
        return value[:rows] if value.ndim and value.size(0) == ids.size(0) else value
    if isinstance(value, dict):
        return {key: replaced(item, ids, altered, rows) for key, item in value.items()}
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        return type(value)(replaced(item, ids, altered, rows) for item in value)
    return value


def bare(module: Any) -> Any:
    """Return what a compiled or data-parallel module wraps: its call needs no other process."""
    while True:
        if type(module).__name__ == "OptimizedModule":
            module = module._orig_mod
        elif type(module).__name__ in ("DistributedDataParallel", "DataParallel"):
            module = module.module
        else:
            return module
