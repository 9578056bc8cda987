"""Tensors of which every process of a parallel run holds the whole: whether the copies agree.

Which processes share a model is not known, so a tensor that they hold parts of is left out, and so is one with which
they began differently.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from conformance.auditing.facts import Facts, clip_factor
from conformance.errors import NotApplicable, quoted
from conformance.recording.snapshot import equal_values
from conformance.recording.trace import Measures, Named

SAME_BATCH = "processes that share a batch may hold parts of one model"
CLIPPED = 1.001
"""Factors of clipping that are farther apart are not those of one norm."""
CAUSES = {
    "start": "the processes do not begin with the same weights: they draw them by different seeds, without a broadcast",
    "gradient": "the gradients of {} are not reduced over the processes, or are changed after that",
    "clipped gradient": "each process clips by another norm",
    "parameters": "the step: no gradient is known to differ, but the processes move the weights differently",
}


@dataclass(frozen=True)
class Drift:
    """Where the copies of some tensors first differ."""

    update: int
    """Counted from 1; 0 is the start."""
    phase: str
    """A phase of ``diff``: start, gradient, clipped gradient or parameters."""
    tensors: tuple[str, ...]
    words: str
    """Which processes hold something else."""

    @property
    def cause(self) -> str:
        """The kind of cause that this looks like."""
        return CAUSES[self.phase].format(quoted(self.tensors))


def first_ids(facts: Facts) -> Tensor | None:
    """Return the token ids of the first training forward."""
    return next((forward.ids for forward in facts.trace.forwards if forward.grad_enabled), None)


def batches_differ(ranks: list[Facts]) -> bool:
    """Return True if no two processes began with the same batch.

    Raises:
        NotApplicable: if the token ids of a process were not seen.
    """
    found = [ids for facts in ranks if (ids := first_ids(facts)) is not None]
    if len(found) < len(ranks):
        raise NotApplicable("token ids were not seen on all processes")
    return not any(
        torch.equal(first, second) for number, first in enumerate(found) for second in found[number + 1 :]
        if first.shape == second.shape
    )  # fmt: skip


def replicated(ranks: list[Facts]) -> list[str]:
    """Return the tensors of which every process holds the whole.

    Raises:
        NotApplicable: if there is none.
    """
    sharded = set[str]().union(*(facts.sharded for facts in ranks))
    shapes = [facts.trace.tensors for facts in ranks]
    names = [name for name in shapes[0] if all(name in other for other in shapes) and name not in sharded]
    if not names:
        raise NotApplicable("every tensor is sharded over the processes")
    return names


def apart(measures: list[Measures | None], samples: list[Named[Tensor]], names: list[str]) -> list[str]:
    """Return the tensors that are not the same on all processes, by the digest of their bits or by their samples.

    A digest is an XOR: equal changes of two elements cancel, as in the first steps of a bias, which all have one size.

    Raises:
        NotApplicable: if a process lacks the measures.
    """
    found = [measure for measure in measures if measure is not None]
    if len(found) < len(measures):
        raise NotApplicable("the weights were not seen on all processes")
    return [
        name
        for name in names
        if all(name in measure.bits for measure in found)
        and (
            any(not torch.equal(found[0].bits[name], other.bits[name]) for other in found[1:])
            or any(not equal_values(samples[0].get(name), other.get(name)) for other in samples[1:])
        )
    ]


def apart_at_start(ranks: list[Facts]) -> list[str]:
    """Return the replicated tensors that the processes began with differently."""
    names = replicated(ranks)
    return apart([f.trace.measured_initial for f in ranks], [f.trace.initial for f in ranks], names)


def apart_after(ranks: list[Facts]) -> tuple[int, list[str]]:
    """Return the first update (counted from 0) that leaves the replicas apart, and their names; none if there is none.

    Raises:
        NotApplicable: if that cannot be judged, or the processes may hold parts of one model.
    """
    names = replicated(ranks)
    count = min(len(facts.updates) for facts in ranks)
    if not count:
        raise NotApplicable("not every process made an update")
    started = set(apart_at_start(ranks))
    names = [name for name in names if name not in started]
    if not names:
        raise NotApplicable("the processes began with different weights")
    # Of plain tensors that hold parts of one model, biases begin at zero on all processes, and then differ.
    if started and not batches_differ(ranks):
        raise NotApplicable(f"the processes began with different weights; {SAME_BATCH}")
    for number in range(count):
        if bad := apart_in(ranks, number, names):
            return number, bad
    return count, []


def apart_in(ranks: list[Facts], number: int, names: list[str]) -> list[str]:
    """Return those of the tensors that an update (counted from 0) leaves different on the processes."""
    updates = [facts.updates[number] for facts in ranks]
    return apart([update.measured_after for update in updates], [update.after for update in updates], names)


def same_gradient(one: Facts, other: Facts, number: int, name: str) -> bool:
    """Return False if a tensor's gradient in an update is known to differ on two processes, before clipping."""
    updates = one.updates[number], other.updates[number]
    measured = [update.measured_gradients for update in updates]
    norms = [measures.norms[name] for measures in measured if measures is not None and name in measures.norms]
    if len(norms) < 2:
        return True
    factors = clip_factor(one, number), clip_factor(other, number)
    if factors[0] == factors[1]:
        samples = [update.gradients.get(name) for update in updates]  # processes do not tell each other theirs
        return equal_values(*norms) and (any(sample is None for sample in samples) or equal_values(*samples))
    lengths = [norm.item() / factor for norm, factor in zip(norms, factors, strict=True)]
    return max(lengths) <= (1 + 1e-3) * min(lengths)  # clipping rounds, in 16 bits by up to 2**-9


def unreduced(ranks: list[Facts], number: int, names: list[str]) -> list[str]:
    """Return the tensors whose gradients in an update are known to differ between processes, before clipping."""
    return [name for name in names if not all(same_gradient(ranks[0], other, number, name) for other in ranks[1:])]


def clipped_apart(ranks: list[Facts], number: int) -> str:
    """Return how clipping scaled the gradients of an update on each process, in words; nothing if it did so alike."""
    factors = [clip_factor(facts, number) for facts in ranks]
    if max(factors) <= CLIPPED * min(factors):
        return ""
    told = ", ".join(f"{factor:.3g}" for factor in factors[:8])
    return f"clipping multiplies the gradients by another factor on each process: {told}"


def drift(ranks: list[Facts]) -> Drift | None:
    """Return where the copies first come apart, and on which processes; None if they do not.

    Raises:
        NotApplicable: if that cannot be judged.
    """
    started = apart_at_start(ranks)
    if started and batches_differ(ranks):
        return Drift(0, "start", tuple(started), odd(ranks, lambda *pair: not apart_at_start([*pair])))
    number, bad = apart_after(ranks)
    if not bad:
        return None
    if names := unreduced(ranks, number, bad):
        words = odd(ranks, lambda *pair: not unreduced([*pair], number, names))
        return Drift(number + 1, "gradient", tuple(names), words)
    if words := clipped_apart(ranks, number):
        return Drift(number + 1, "clipped gradient", tuple(bad), words)
    words = odd(ranks, lambda *pair: not apart_in([*pair], number, bad))
    return Drift(number + 1, "parameters", tuple(bad), words)


def odd(ranks: list[Facts], alike: Callable[[Facts, Facts], bool]) -> str:
    """Return the processes that differ from most others, in words."""
    common = max(ranks, key=lambda facts: sum(alike(facts, other) for other in ranks))
    others = [facts.rank for facts in ranks if not alike(common, facts)]
    plural = len(others) > 1
    return f"process{'es' * plural} {quoted(others, limit=8)} differ{'s' * (not plural)} from process {common.rank}"
