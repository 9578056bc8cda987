"""The processes of a parallel run, side by side.

Which of them share a model is not known, so what must agree is judged where it is certain: in data-parallel runs, whose
processes see different batches. A tensor that processes hold parts of is left out.
"""

import torch

from conformance.auditing.entropies import weights
from conformance.auditing.facts import Facts
from conformance.auditing.replicas import (
    SAME_BATCH,
    apart_after,
    apart_at_start,
    batches_differ,
    clipped_apart,
    first_ids,
    unreduced,
)
from conformance.auditing.rule import Doubt, Seen, rule
from conformance.errors import NotApplicable, Violation, quoted

DATA_PARALLEL = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine")


def heard(seen: Seen) -> list[Facts]:
    """Return the facts of all processes. Raises NotApplicable if there is one, or some are missing."""
    if len(seen.ranks) < 2:
        raise NotApplicable("the run has one process")
    silent = [str(facts.rank) for facts in seen.ranks if not facts.reported]
    if silent:
        raise NotApplicable(f"nothing was heard of process {', '.join(silent)}")
    return seen.ranks


@rule(
    "same-data",
    "ranks",
    why="Processes that train on the same batch do the work of one.",
    mend="Call init_process_group and wrap the model in DistributedDataParallel. Use a DistributedSampler (and "
    "set_epoch), or seed and slice the data by the process's rank.",
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
    if same and not any(facts.connected for facts in ranks):
        raise Doubt(
            "a process group of torch.distributed, through which the processes exchange gradients",
            f"none: all {len(ranks)} processes train by themselves, and begin with the same batch",
        )
    if not any(name in facts.wrappers for facts in ranks for name in DATA_PARALLEL) or not same:
        raise NotApplicable(SAME_BATCH)
    if any(facts.sharded for facts in ranks) and "FSDPModule" not in ranks[0].wrappers:
        raise NotApplicable(SAME_BATCH)
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
    bad = apart_at_start(ranks)
    if not batches_differ(ranks):
        raise NotApplicable(SAME_BATCH)
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
    number, bad = apart_after(ranks)
    if bad:
        gradients, clipping = unreduced(ranks, number, bad), clipped_apart(ranks, number)
        seen_there = [f"they differ in {quoted(bad)}"]
        seen_there += [f"the gradients of {quoted(gradients)} are not reduced"] if gradients else []
        seen_there += [clipping] if clipping else []
        raise Violation(f"equal replicas after update {number + 1}", "; ".join(seen_there))


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
        raise NotApplicable(SAME_BATCH)
    device = ranks[0].device if ranks[0].device in ranks[0].generators else "cpu"
    states = [facts.generators.get(device) for facts in ranks]
    if None in states:
        raise NotApplicable("the generators' states were not seen")
    if len(set(states)) == 1:
        raise Violation("another state of the generator on each process", "all processes are in the same state")


@rule(
    "one-factor",
    "ranks",
    why="Processes that scale a shared gradient, each by another factor, take other steps: replicas drift apart, and "
    "the parts of a sharded tensor are no longer one gradient.",
    mend="Clip by the norm of the whole gradient on every process: torch.nn.utils.clip_grad_norm_ with the model's own "
    "(distributed) tensors, or the method of the wrapper.",
    source="DeepSpeed#1801, pytorch#72548, torchtitan#766",
    together=True,
)
def scaled_alike(seen: Seen) -> None:
    """Between the last backward and the step, all processes scale the gradient by the same factor."""
    ranks = heard(seen)
    if not all(any(name in facts.wrappers for name in DATA_PARALLEL) for facts in ranks):
        raise NotApplicable("the gradients are not reduced in the backward, by DDP or FSDP")
    judged = False
    for number in range(min(len(facts.updates) for facts in ranks)):
        factors = [factor for facts in ranks if (factor := factor_of(facts, number)) is not None]
        if len(factors) < len(ranks):
            continue
        judged = True
        if max(factors) > 1.02 * min(factors):
            told = ", ".join(f"{factor:.3g}" for factor in factors[:8])
            raise Violation(f"one factor on all processes in update {number + 1}", f"by process: {told}")
    if not judged:
        raise NotApplicable("the gradients were not seen after the backward and at the step")


def factor_of(facts: Facts, number: int) -> float | None:
    """Return by how much this process scaled its gradients between the last backward of an update and the step."""
    passes = [backward for backward in facts.backwards if backward.update == number]
    measured = facts.updates[number].measured_gradients
    if not passes or measured is None or facts.updates[number].skipped:
        return None
    names = [name for name in passes[-1].norms if name in measured.norms]
    before = sum(passes[-1].norms[name].item() ** 2 for name in names) ** 0.5
    after = sum(measured.norms[name].item() ** 2 for name in names) ** 0.5
    return after / before if before and names else None


@rule(
    "summed-gradients",
    "ranks",
    why="A sum over processes in place of a mean makes the gradient longer with every process that you add: the "
    "clipping limit and the rate mean another thing on each number of them.",
    mend="Divide by the number of processes after all_reduce, or reduce with ReduceOp.AVG.",
    source="hand-written data parallelism; pytorch: DDP averages",
    together=True,
)
def averaged(seen: Seen) -> None:
    """Processes whose losses are means average their gradients."""
    ranks = heard(seen)
    if any(name in facts.wrappers for facts in ranks for name in DATA_PARALLEL) or any(f.sharded for f in ranks):
        raise NotApplicable("DDP or FSDP reduces the gradients")
    judged = False
    for number in range(min(len(facts.updates) for facts in ranks)):
        own = [weights(facts)[number : number + 1] for facts in ranks]
        if not all(own) or any(abs(sum(w * n for w, n in update[0]) - 1) > 0.05 for update in own):
            continue  # the losses are not means: they may be made for a sum
        before = [ended(facts, number) for facts in ranks]
        after = reached(ranks[0], number)
        if None in before or after is None:
            continue
        judged = True
        longest = sum(norm for norm in before if norm is not None) / len(ranks)
        if after > 1.02 * longest:
            raise Violation(
                f"a gradient of norm {longest:.4g} at most in update {number + 1}: the mean of the processes'",
                f"{after:.4g}, {after / longest:.3g} times as long: it is their sum",
            )
    if not judged:
        raise NotApplicable("the losses of the processes are not means, or their gradients were not seen")


def ended(facts: Facts, number: int) -> float | None:
    """Return the norm of a process's gradient when the last backward of an update had ended."""
    passes = [backward for backward in facts.backwards if backward.update == number]
    return sum(norm.item() ** 2 for norm in passes[-1].norms.values()) ** 0.5 if passes else None


def reached(facts: Facts, number: int) -> float | None:
    """Return the norm of the gradient that clipping saw, or the step where nothing is clipped."""
    clips = [clip for clip in facts.clips if clip.update == number]
    if clips:
        norm = clips[0].norm
        return norm.item() if len(clips) == 1 and norm is not None else None
    measured = facts.updates[number].measured_gradients
    return None if measured is None else sum(norm.item() ** 2 for norm in measured.norms.values()) ** 0.5


@rule(
    "uneven-targets",
    "ranks",
    why="DDP averages over processes. If they have different numbers of targets, a mean on each weighs them unequally.",
    mend="Divide each process's sum by the number of targets of all processes, times the number of processes.",
    source="transformers#34191, #34242; speculators#942",
    together=True,
)
def even_targets(seen: Seen) -> None:
    """Processes whose mean losses are averaged have equally many targets."""
    ranks = heard(seen)
    for number, own in enumerate(zip(*(weights(facts) for facts in ranks), strict=False), start=1):
        pairs = [pair for update in own for pair in update]
        least, most = min(weight for weight, _ in pairs), max(weight for weight, _ in pairs)
        fewest, many = min(count for _, count in pairs), max(count for _, count in pairs)
        if least > 0 and most / least > 1 + max(0.01, 0.1 * (many / fewest - 1)):
            raise Violation(
                f"each target of update {number} has the same weight on all processes",
                f"targets weigh up to {most / least:.3g} times as much as others; there are {fewest} to {many}",
            )
    counts = [[e.counted for e in facts.trace.entropies if e.grad_enabled and e.reduction == "mean"] for facts in ranks]
    if not all(counts):
        raise NotApplicable("no mean cross entropy was seen on every process")
    for number, found in enumerate(zip(*counts, strict=False), start=1):
        if len(set(found)) > 1:
            raise Doubt("as many targets on each process", f"microbatch {number} has {quoted(found, limit=8)}")
