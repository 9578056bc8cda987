"""One run from the records of its processes: what a comparison needs, however the run was split.

Batches are gathered from all processes and microbatches; a sharded tensor is put together from its parts. Runs of other
world sizes, other parallelism and other microbatches then stand side by side.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from conformance.auditing.facts import Facts, clip_factor
from conformance.auditing.replicas import Drift, drift
from conformance.errors import NotApplicable
from conformance.recording.trace import Measures, Named


@dataclass(frozen=True)
class Values:
    """Named tensors at one moment: samples, and the norm of each whole tensor."""

    samples: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class WholeUpdate:
    """One update of a run, over all processes."""

    rows: tuple[tuple[int, ...], ...]
    """All sequences, sorted; empty if none was seen."""
    first_row: tuple[int, ...]
    """Of the first microbatch of process 0."""
    entropy: float | None
    """Mean cross entropy over all targets; None if it was not seen."""
    loss: float | None
    """What backward began at, summed over microbatches and averaged over processes."""
    accumulated: Values
    """Gradients when the last backward had ended: norms only."""
    gradients: Values
    """As the step found them."""
    unclipped: Values
    """As clipping found them: the same, if nothing clipped them."""
    without: frozenset[str]
    """Tensors that had no gradient."""
    before: Values
    after: Values
    settings: dict[str, dict[str, float]]
    """Hyper-parameters of each tensor: lr, weight_decay, ..."""
    clip: float | None
    optimizers: tuple[str, ...]


@dataclass(frozen=True)
class WholeRun:
    """A run, over all processes."""

    sizes: dict[str, int]
    """Elements of each whole tensor."""
    initial: Values
    updates: list[WholeUpdate]
    dtypes: frozenset[torch.dtype]
    """In which it computes: of autocast, of the weights, of linear layers' outputs."""
    weights: frozenset[torch.dtype]
    dropout: bool
    processes: int
    drift: Drift | None = None
    """Where the processes' copies of a tensor come apart. Values are those of process 0, which shows nothing of it."""
    unseen: str = ""
    """Why the processes were not compared with each other, if there are several."""


def whole_run(ranks: list[Facts]) -> WholeRun:
    """Return one run from the records of its processes."""
    first = ranks[0]
    infos = first.trace.tensors
    forwards = [forward for forward in first.trace.forwards if forward.grad_enabled]
    weights = frozenset(info.dtype for info in infos.values())
    autocast = {forward.autocast for forward in forwards if forward.autocast is not None}
    count = min(len(facts.updates) for facts in ranks)
    found, unseen = drift_of(ranks)
    return WholeRun(
        sizes={name: math.prod(info.shape) for name, info in infos.items()},
        initial=joined(ranks, [facts.trace.initial for facts in ranks], [f.trace.measured_initial for f in ranks]),
        updates=[whole_update(ranks, number) for number in range(count)],
        dtypes=frozenset(autocast) or weights,
        weights=weights,
        dropout=any(first.dropout.values()),
        processes=len(ranks),
        drift=found,
        unseen=unseen,
    )


def drift_of(ranks: list[Facts]) -> tuple[Drift | None, str]:
    """Return where the processes' copies come apart, and why that was not looked at."""
    silent = ranks[0].world - len(ranks)
    unseen = f"{silent} of {ranks[0].world} left no record" if silent > 0 else ""
    try:
        return (drift(ranks) if len(ranks) > 1 else None), unseen
    except NotApplicable as reason:
        return None, str(reason)


def whole_update(ranks: list[Facts], number: int) -> WholeUpdate:
    """Return one update over all processes."""
    first = ranks[0]
    updates = [facts.updates[number] for facts in ranks]
    forwards = [
        [f for f in facts.trace.forwards if f.grad_enabled and f.update == number and not f.evaluation]
        for facts in ranks
    ]
    batches = [[tuple(row) for forward in own for row in forward.ids.tolist()] for own in forwards]
    if first.sharded and "FSDPModule" not in first.wrappers:  # tensor parallelism: a batch is seen by several processes
        batches = [list(batch) for batch in dict.fromkeys(map(tuple, batches))]
    rows = sorted(row for batch in batches for row in batch)
    entropies = [e for facts in ranks for e in facts.trace.entropies if e.grad_enabled and e.update == number]
    entropies = [e for e in entropies if e.counted and e.value.ndim == 0]
    targets = sum(entropy.counted for entropy in entropies)
    backwards = [[b for b in facts.backwards if b.update == number] for facts in ranks]
    losses = [sum(loss.item() for b in own for loss in b.losses) for own in backwards if own]
    last = [Measures(own[-1].norms, Named()) if own else None for own in backwards]
    groups = {name: group.settings for group in updates[0].groups for name in group.tensors}
    limits = [clip.limit for clip in first.clips if clip.update == number]
    gradients = [{name: value for name, value in update.gradients.items() if value is not None} for update in updates]
    at_step = joined(ranks, gradients, [update.measured_gradients for update in updates])
    clipped = {name for clip in first.clips for name in clip.tensors} - first.sharded
    factor = clip_factor(first, number)
    return WholeUpdate(
        rows=tuple(rows),
        first_row=tuple(forwards[0][0].ids[0].tolist()) if forwards[0] else (),
        entropy=sum(entropy.total for entropy in entropies) / targets if targets else None,
        loss=sum(losses) / len(losses) if losses else None,
        accumulated=joined(ranks, [{} for _ in ranks], last),
        gradients=at_step,
        unclipped=Values(
            {name: value / factor if name in clipped else value for name, value in at_step.samples.items()},
            {name: norm / factor if name in clipped else norm for name, norm in at_step.norms.items()},
        ),
        without=frozenset(name for name, value in updates[0].gradients.items() if value is None),
        before=joined(ranks, [update.before for update in updates], [None for _ in ranks]),
        after=joined(ranks, [update.after for update in updates], [update.measured_after for update in updates]),
        settings={name: numbers(settings) for name, settings in groups.items()},
        clip=limits[-1] if limits else None,
        optimizers=tuple(sorted({step.optimizer[0].rpartition(".")[2] for step in updates[0].steps if step.optimizer})),
    )


def numbers(settings: dict[str, object]) -> dict[str, float]:
    """Return the hyper-parameters that are numbers, and the parts of those that are pairs."""
    found: dict[str, float] = {}
    for key, value in settings.items():
        for index, item in enumerate(value if isinstance(value, tuple) else (value,)):
            plain = item.item() if isinstance(item, Tensor) and item.numel() == 1 else item
            if isinstance(plain, int | float) and not isinstance(plain, bool):
                found[f"{key}[{index}]" if isinstance(value, tuple) else key] = float(plain)
    return found


def joined(ranks: list[Facts], samples: list[dict[str, Tensor]], measured: list[Measures | None]) -> Values:
    """Return named tensors of all processes as of one: a sharded tensor from its parts, another from process 0."""
    found: dict[str, Tensor] = {}
    norms: dict[str, float] = {}
    for name in samples[0] or (measured[0].norms if measured[0] is not None else ()):
        parts = parts_of(ranks, name)
        values = [samples[number][name] for number in parts if name in samples[number]]
        if values:
            whole = values[0].clone()
            for value in values[1:]:
                whole = torch.where(whole.isnan(), value, whole)
            found[name] = whole
        lengths = [m.norms[name] for number in parts if (m := measured[number]) is not None and name in m.norms]
        if lengths:
            norms[name] = math.sqrt(sum(length.double().item() ** 2 for length in lengths))
    return Values(found, norms)


def parts_of(ranks: list[Facts], name: str) -> list[int]:
    """Return processes that together hold a tensor once: of those with the same part, the first."""
    if name not in ranks[0].sharded:
        return [0]
    places: dict[tuple[int, ...], int] = {}
    for number, facts in enumerate(ranks):
        places.setdefault(facts.offsets.get(name, (number,)), number)
    return list(places.values())
