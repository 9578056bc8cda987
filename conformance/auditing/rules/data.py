"""Batches and targets."""

from collections import Counter

import torch
from torch import Tensor

from conformance.auditing.entropies import of_training
from conformance.auditing.facts import Facts
from conformance.auditing.rule import Doubt, Seen, rule
from conformance.errors import NotApplicable, Violation
from conformance.recording.trace import CrossEntropy, Forward

FITS, ALIEN = 0.95, 0.5
SHIFTS = (0, 2, -1, 3)
"""Wrong distances between an input token and its target."""


def training(facts: Facts) -> list[Forward]:
    """Return the forwards that led to a backward. Raises NotApplicable if none was seen."""
    found = [forward for forward in facts.trace.forwards if forward.grad_enabled and forward.evaluation == 0]
    found = [forward for forward in found if forward.update < max(len(facts.updates), 1)]
    if not found:
        raise NotApplicable("no forward of the model with token ids was seen")
    return found


@rule(
    "shift",
    "data",
    why="A model that is asked for the token it sees learns to copy: its loss falls to 0 and it has learnt nothing. "
    "One that is asked for the token after the next learns a harder, wrong task.",
    mend="The target of position t is token t + 1. Shift once: either in the data or in the model (a Hugging Face "
    "model shifts `labels` itself).",
    source="LLaMA-Factory#3550; minGPT: batches",
)
def shifted_once(seen: Seen) -> None:
    """The target at each position is the next token."""
    judged = 0
    for ids, targets in paired(seen.facts):
        found = misplaced(ids, targets)
        if found is None:
            continue
        judged += 1
        if found:
            raise Violation("targets that are the next token", found)
    if not judged:
        raise NotApplicable("the targets are not the ids of the same batch, in the same order")


def misplaced(ids: Tensor, targets: Tensor) -> str | None:
    """Return in words where the targets lie instead of at the next token; empty if there, None if that cannot be said.

    Args:
        ids: (B, T).
        targets: (B, T or T - 1), negative where there is none.
    """
    share = {shift: agreement(ids, targets, shift) for shift in (1, *SHIFTS)}
    right = share.pop(1)
    if right is None:
        return None
    words = {0: "the token itself", 2: "the token after the next", -1: "the token before"}
    for shift, found in share.items():
        if found is not None and found > FITS and right < ALIEN:
            ahead = words.get(shift, f"{shift} tokens ahead")
            return f"{found:.0%} of the targets are {ahead}, {right:.0%} the next"
    return ""


def paired(facts: Facts) -> list[tuple[Tensor, Tensor]]:
    """Return ids (B, T) and targets (B, T or T - 1) that belong together, of training."""
    entropies, forwards = of_training(facts), training(facts)
    own = [ids for _, _, ids in entropies if ids is not None] or [forward.ids for forward in forwards]
    return pair_up(own, [entropy for entropy, _, _ in entropies])


def pair_up(own: list[Tensor], entropies: list[CrossEntropy]) -> list[tuple[Tensor, Tensor]]:
    """Return ids and targets that belong together, from both in their order."""
    if len(entropies) < len(own):
        raise NotApplicable("there are fewer cross entropies than forwards")
    # A model with several heads computes as many losses of each forward.
    each, rest = divmod(len(entropies), max(len(own), 1))
    each = 1 if rest else each
    pairs = []
    for number, ids in enumerate(own):
        fitting = []
        for entropy in entropies[number * each : (number + 1) * each]:
            if entropy.targets.numel() % len(ids):
                continue
            targets = entropy.labels.reshape(len(ids), -1)
            if targets.size(1) in (ids.size(1), ids.size(1) - 1):
                fitting.append(targets)
        if fitting:  # of several heads, the one that predicts the next token
            pairs.append((ids, max(fitting, key=lambda targets: agreement(ids, targets, 1) or 0.0)))
    return pairs


def agreement(ids: Tensor, targets: Tensor, shift: int) -> float | None:
    """Return the share of targets that are the token ``shift`` places ahead; None if too few can be compared."""
    length = ids.size(1)
    # Where the model shifts inside and drops the last logit, targets have T - 1 places and begin at token 0's.
    start, end = max(0, -shift), min(targets.size(1), length - shift)
    if end - start < 2:
        return None
    ahead, wanted = ids[:, start + shift : end + shift], targets[:, start:end]
    counted = wanted >= 0
    if int(counted.sum()) < 4:
        return None
    return float((ahead == wanted)[counted].float().mean())


def refuse_full_batch(facts: Facts) -> None:
    """Raise NotApplicable where an optimizer evaluates its closure several times, as LBFGS does on all data at once."""
    if any(step.evaluations > 1 for update in facts.updates for step in update.steps):
        raise NotApplicable("the optimizer evaluates a closure several times: it is made for one batch")
    if any(step.optimizer and step.optimizer[0].endswith(".Rprop") for u in facts.updates for step in u.steps):
        raise NotApplicable("Rprop compares gradients of the same batch")


def repeats_on_purpose(facts: Facts) -> bool:
    """Return True if the run may repeat its batches by design, as PPO does: it trains by no cross entropy."""
    try:
        return not of_training(facts)
    except NotApplicable:
        # In compiled code, or of a model that is given labels, there may be one that the audit does not see.
        return not facts.compiled and not facts.noticed.labels


@rule(
    "same-batch",
    "data",
    why="A loop that draws its batch once, or whose generator is seeded in the loop, trains on one batch for ever.",
    mend="Draw a batch in every update. If you overfit one batch to test the model, or take several updates from each "
    "batch, as PPO does, say so: --allow 'same-batch=REASON'.",
    source="Karpathy, A Recipe for Training Neural Networks: overfit one batch",
)
def new_batches(seen: Seen) -> None:
    """Each update trains on different data."""
    refuse_full_batch(seen.facts)
    first: dict[int, Tensor] = {}
    for forward in training(seen.facts):
        first.setdefault(forward.update, forward.ids)
    if len(first) < 2:
        raise NotApplicable("fewer than two updates with token ids were seen")
    batches = list(first.values())
    same = [torch.equal(batches[0], other) for other in batches[1:]]
    if all(same):
        words = f"all {len(batches)} updates begin with the same batch"
        doubtful = len(batches) <= 2 or repeats_on_purpose(seen.facts)
        raise (Doubt if doubtful else Violation)("another batch in each update", words)


@rule(
    "repeats",
    "data",
    why="Sequences that come twice within a few updates are a small data set, or a sampler that draws with "
    "replacement, or workers that all begin at the same place.",
    mend="Give each worker and each process its own part of the data, and draw without replacement. If you take "
    "several updates from each batch on purpose, as PPO does, say so: --allow 'repeats=REASON'.",
    source="pytorch: IterableDataset and workers",
)
def few_repeats(seen: Seen) -> None:
    """No sequence is seen twice within the recorded updates."""
    refuse_full_batch(seen.facts)
    rows: Counter[tuple[int, ...]] = Counter()
    again, looked = {update for update, _ in seen.facts.noticed.cleared}, dict[int, list[tuple[int, ...]]]()
    for forward in training(seen.facts):
        if forward.ids.size(1) >= 8:
            own = [tuple(row) for row in forward.ids.tolist()]
            # SAM runs each batch twice, and takes the gradient of the second run only.
            twice = forward.update in again and looked.get(forward.update) == own
            looked[forward.update] = own
            rows.update([] if twice else own)
    if not rows:
        raise NotApplicable("the sequences are too short to be told apart")
    total = sum(rows.values())
    repeated = total - len(rows)
    if repeated > max(1, 0.02 * total):
        few = total >= 16 and total >= 4 * len(rows) and not repeats_on_purpose(seen.facts)
        words = f"{repeated} of {total} sequences were seen before"
        raise (Violation if few else Doubt)("each sequence once", f"{words}: there are {len(rows)}" if few else words)
