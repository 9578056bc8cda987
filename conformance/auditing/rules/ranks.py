"""The processes of a parallel run, side by side.

Which of them share a model is not known, so what must agree is judged where it is certain: in data-parallel runs, whose
processes see different batches. A tensor that processes hold parts of is left out.
"""

import torch

from conformance.auditing.facts import Facts
from conformance.auditing.rule import Doubt, Seen, rule
from conformance.errors import NotApplicable, Violation, quoted
from conformance.recording.trace import Measures

DATA_PARALLEL = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine")


def heard(seen: Seen) -> list[Facts]:
    """Return the facts of all processes. Raises NotApplicable if there is one, or some are missing."""
    if len(seen.ranks) < 2:
        raise NotApplicable("the run has one process")
    silent = [str(facts.rank) for facts in seen.ranks if not facts.reported]
    if silent:
        raise NotApplicable(f"nothing was heard of process {', '.join(silent)}")
    return seen.ranks


def first_ids(facts: Facts) -> torch.Tensor | None:
    """Return the token ids of the first training forward."""
    return next((forward.ids for forward in facts.trace.forwards if forward.grad_enabled), None)


def batches_differ(ranks: list[Facts]) -> bool:
    """Return True if no two processes began with the same batch."""
    found = [ids for facts in ranks if (ids := first_ids(facts)) is not None]
    if len(found) < len(ranks):
        raise NotApplicable("token ids were not seen on all processes")
    return not any(
        torch.equal(first, second) for number, first in enumerate(found) for second in found[number + 1 :]
        if first.shape == second.shape
    )  # fmt: skip


def apart(measures: list[Measures | None], names: list[str]) -> list[str]:
    """Return the tensors whose bits are not the same on all processes."""
    found = [measure for measure in measures if measure is not None]
    if len(found) < len(measures):
        raise NotApplicable("the weights were not seen on all processes")
    return [
        name
        for name in names
        if all(name in measure.bits for measure in found)
        and any(not torch.equal(found[0].bits[name], other.bits[name]) for other in found[1:])
    ]


def replicated(ranks: list[Facts]) -> list[str]:
    """Return the tensors of which every process holds the whole."""
    sharded = set[str]().union(*(facts.sharded for facts in ranks))
    shapes = [facts.trace.tensors for facts in ranks]
    names = [name for name in shapes[0] if all(name in other for other in shapes) and name not in sharded]
    if not names:
        raise NotApplicable("every tensor is sharded over the processes")
    return names


@rule(
    "same-data",
    "ranks",
    why="Processes that train on the same batch do the work of one.",
    mend="Use a DistributedSampler (and set_epoch), or seed and slice the data by the process's rank.",
    source="pytorch: DistributedSampler; accelerate#2126",
    together=True,
)
def own_data(seen: Seen) -> None:
    """Each data-parallel process has its own batches."""
    ranks = heard(seen)
    if batches_differ(ranks):
        return
    found = [first_ids(facts) for facts in ranks]
    same = all(other is not None and found[0] is not None and torch.equal(found[0], other) for other in found[1:])
    if not any(name in facts.wrappers for facts in ranks for name in DATA_PARALLEL) or not same:
        raise NotApplicable("processes that share a batch may hold parts of one model")
    if any(facts.sharded for facts in ranks) and "FSDPModule" not in ranks[0].wrappers:
        raise NotApplicable("processes that share a batch may hold parts of one model")
    raise Violation("other batches on each process", f"all {len(ranks)} processes begin with the same batch")


@rule(
    "starts-differ",
    "ranks",
    why="Replicas that begin apart and add up one gradient stay apart: each process trains another model.",
    mend="Seed all processes alike while the model is built, or broadcast the weights of process 0 (DDP does).",
    source="pytorch: DDP without a broadcast; nanotron#77",
    together=True,
)
def same_start(seen: Seen) -> None:
    """All processes of a data-parallel run begin with the same weights."""
    ranks = heard(seen)
    names = replicated(ranks)
    if not batches_differ(ranks):
        raise NotApplicable("processes that share a batch may hold parts of one model")
    bad = apart([facts.trace.measured_initial for facts in ranks], names)
    if bad:
        raise Violation("the same weights on all processes at the start", f"they differ in {quoted(bad)}")


@rule(
    "replicas-apart",
    "ranks",
    why="Replicas that drift are separate models; what is saved is the one of process 0, trained on its part of the "
    "data alone.",
    mend="Wrap the model in DDP or FSDP and call the wrapper (not `model.module`); reduce gradients before the step, "
    "including those of parameters that were added later; leave no_sync before the last backward.",
    source="pytorch: DDP, no_sync",
    together=True,
)
def same_weights(seen: Seen) -> None:
    """Replicas are equal after every update."""
    ranks = heard(seen)
    names = replicated(ranks)
    count = min(len(facts.updates) for facts in ranks)
    if not count:
        raise NotApplicable("not every process made an update")
    started = set(apart([facts.trace.measured_initial for facts in ranks], names))
    names = [name for name in names if name not in started]
    if not names:
        raise NotApplicable("the processes began with different weights")
    for number in range(count):
        bad = apart([facts.updates[number].measured_after for facts in ranks], names)
        if bad:
            gradients = [name for name in bad if not one_norm(ranks, number, name)]
            cause = f"; the gradients of {quoted(gradients)} are not reduced" if gradients else ""
            raise Violation(f"equal replicas after update {number + 1}", f"they differ in {quoted(bad)}{cause}")


def one_norm(ranks: list[Facts], number: int, name: str) -> bool:
    """Return True if a tensor's gradient in an update has the same norm on all processes."""
    found = [facts.updates[number].measured_gradients for facts in ranks]
    norms = [measure.norms[name].item() for measure in found if measure is not None and name in measure.norms]
    return len(norms) == len(ranks) and max(norms) == min(norms)


@rule(
    "same-masks",
    "ranks",
    why="Processes that draw the same dropout masks see less noise than they should.",
    mend="Seed each data-parallel process with its rank once the model is built.",
    source="megatron: model-parallel and data-parallel seeds",
    together=True,
)
def own_masks(seen: Seen) -> None:
    """Data-parallel processes draw different dropout masks."""
    ranks = heard(seen)
    if not any(any(facts.dropout.values()) for facts in ranks):
        raise NotApplicable("the model drops nothing")
    if not batches_differ(ranks):
        raise NotApplicable("processes that share a batch may hold parts of one model")
    device = ranks[0].device if ranks[0].device in ranks[0].generators else "cpu"
    states = [facts.generators.get(device) for facts in ranks]
    if None in states:
        raise NotApplicable("the generators' states were not seen")
    if len(set(states)) == 1:
        raise Violation("another state of the generator on each process", "all processes are in the same state")


@rule(
    "uneven-targets",
    "ranks",
    why="DDP averages over processes. If they have different numbers of targets, a mean on each weighs them unequally.",
    mend="Divide each process's sum by the number of targets of all processes, times the number of processes.",
    source="transformers#34191",
    advice=True,
    together=True,
)
def even_targets(seen: Seen) -> None:
    """Processes whose mean losses are averaged have equally many targets."""
    ranks = heard(seen)
    counts = [[e.counted for e in facts.trace.entropies if e.grad_enabled and e.reduction == "mean"] for facts in ranks]
    if not all(counts):
        raise NotApplicable("no mean cross entropy was seen on every process")
    for number, found in enumerate(zip(*counts, strict=False), start=1):
        if len(set(found)) > 1:
            raise Doubt("as many targets on each process", f"microbatch {number} has {quoted(found, limit=8)}")
