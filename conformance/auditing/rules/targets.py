"""Targets: what of a sequence is predicted, and what is left out."""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from conformance.auditing.entropies import of_training
from conformance.auditing.rule import Doubt, Seen, rule
from conformance.auditing.rules.data import FITS, SHIFTS, agreement, paired
from conformance.errors import NotApplicable, Violation

ROWS = 6
"""Sequences that a rule wants to see before it speaks."""
OFTEN = 4
Row = list[tuple[int, int | None]]
"""Of a sequence: each next token, and its target, or None where nothing is to be predicted."""


def pairs(seen: Seen) -> list[tuple[Tensor, Tensor]]:
    """Return ids (B, T) and targets (B, T or T - 1): of cross entropies, or the labels that the model was given."""
    try:
        return paired(seen.facts)
    except NotApplicable:
        found = [(ids.cpu(), labels.cpu()[:, 1:]) for ids, labels in seen.facts.noticed.labels]
        if not found:
            raise
        return found


def rows(seen: Seen) -> Iterator[Row]:
    """Yield the sequences of training whose targets are the next tokens of the same batch."""
    for ids, targets in pairs(seen):
        if (agreement(ids, targets, 1) or 0.0) < 0.9:
            continue
        # Targets with T - 1 places belong to the logits without the last; both begin with the token after the first.
        length = min(targets.size(1), ids.size(1) - 1)
        for own, wanted in zip(ids[:, 1 : length + 1].tolist(), targets[:, :length].tolist(), strict=True):
            yield [(token, None if target < 0 else target) for token, target in zip(own, wanted, strict=True)]


@rule(
    "own-targets",
    "targets",
    why="Targets that are not in the sequence cannot be learnt from it: rows or columns were mixed up on the way.",
    mend="Follow ids and labels from the data set through the collator to the loss: same rows, order and packing.",
    source="TRL and unsloth: labels lost under packing (trl#3728)",
)
def targets_of_the_sequence(seen: Seen) -> None:
    """The targets of a sequence are tokens of the same sequence."""
    judged = 0
    for ids, targets in paired(seen.facts):
        found = [share for shift in (1, *SHIFTS) if (share := agreement(ids, targets, shift)) is not None]
        counted = targets >= 0
        if not found or int(counted.sum()) < 16:
            continue
        judged += 1
        chance = max(Counter(targets[counted].tolist()).values()) / int(counted.sum())
        if max(found) < min(0.2, 0.1 + chance):
            if any(follows(other, targets) for other in seen.facts.noticed.second_ids):
                raise NotApplicable("the targets are the next tokens of another argument: those of a decoder")
            if fills_gaps(ids, targets):
                raise NotApplicable("most targets lie where the model is given one and the same token: it fills gaps")
            # Few targets, or few kinds of them, may be another task: masked tokens, tags of words.
            whole = bool(counted.float().mean() > 0.9) and len(targets[counted].unique()) > 20 and max(found) < 0.1
            raise (Violation if whole else Doubt)(
                "targets that are tokens of the same sequence", f"{max(found):.0%} are, at the best shift"
            )
    if not judged:
        raise NotApplicable("no batch of ids with as many targets was seen")


def fills_gaps(ids: Tensor, targets: Tensor) -> bool:
    """Return True if the ids at the places of the targets are mostly one token, which elsewhere is rare: a mask."""
    wanted = targets >= 0
    if targets.shape != ids.shape or not wanted.any() or wanted.all():
        return False
    mask = ids[wanted].mode().values
    return bool((ids[wanted] == mask).float().mean() > 0.5 and (ids[~wanted] == mask).float().mean() < 0.1)


def follows(ids: Tensor, targets: Tensor) -> bool:
    """Return True if targets are the next tokens of these ids."""
    return ids.size(0) == targets.size(0) and (agreement(ids.cpu(), targets, 1) or 0.0) > FITS


@rule(
    "never-a-target",
    "targets",
    why="A token that is masked wherever it comes is never learnt. Often it is the end token, as padding has the same "
    "id: the model does not learn to stop.",
    mend="Mask padding by its place (attention_mask, lengths), not by its id.",
    source="transformers#23530, trl#976",
    advice=True,
)
def every_token_is_predicted(seen: Seen) -> None:
    """Every token of the trained text is a target at least once."""
    masked, predicted, judged = Counter[int](), Counter[int](), 0
    for row in rows(seen):
        judged += 1
        for place, (token, target) in enumerate(row):
            amid = 0 < place < len(row) - 1 and None not in (row[place - 1][1], row[place + 1][1])
            if target is not None:
                predicted[token] += 1
            elif amid:
                masked[token] += 1
    if not judged:
        raise NotApplicable("the targets are not the ids of the same batch, in the same order")
    never = [token for token, count in masked.items() if count >= OFTEN and not predicted[token]]
    if never:
        words = f"token {never[0]} comes {masked[never[0]]} times amid predicted tokens and is always left out"
        raise Violation("targets for all tokens between predicted ones", words)


@rule(
    "ends-untrained",
    "targets",
    why="Where the last token of an answer is left out, the model never learns to stop; where the answer is left out "
    "and the question is not, it learns to ask.",
    mend="Give the end token of each answer a target, and mask the prompt before it; look at one decoded row.",
    source="trl#976, transformers#22794; trl#3728",
    advice=True,
)
def ends_are_predicted(seen: Seen) -> None:
    """If only parts of a sequence are targets, the token that ends it is a target, too."""
    after, last, partly, rests = Counter[int](), Counter[int](), 0, 0
    for row in rows(seen):
        places = [place for place, (_, target) in enumerate(row) if target is not None]
        if not places or places[-1] == len(row) - 1:
            continue
        tail = [token for token, _ in row[places[-1] + 1 :]]
        partly += 1
        after[tail[0]] += 1
        last[row[places[-1]][0]] += 1
        rests += len(set(tail)) > 2
    if partly < ROWS:
        raise NotApplicable(f"fewer than {ROWS} sequences leave out their end")
    if rests > 0.7 * partly:
        raise Violation(
            "targets in the last part of each sequence",
            f"{rests} of {partly} sequences leave out their end, of several tokens, and predict what is before it",
        )
    (token, count), (_, alike) = after.most_common(1)[0], last.most_common(1)[0]
    if count > 0.7 * partly and alike < 0.5 * partly:
        words = f"token {token} ends {count} of {partly} sequences and is left out; the last targets differ"
        raise Violation("a common last target: the end token", words)


@rule(
    "padding-trained",
    "targets",
    why="Targets that are padding teach the model to repeat padding, and make the loss look better than it is.",
    mend="Set labels to -100 (or your ignore_index) where there is padding.",
    source="axolotl#3809",
)
def padding_is_left_out(seen: Seen) -> None:
    """Padding is not among the targets."""
    runs: Counter[int] = Counter()
    inside: Counter[int] = Counter()
    among: Counter[int] = Counter()  # repeated amid a sequence: the indentation of code, by bytes, is no padding
    lengths: dict[int, set[int]] = {}
    judged = 0
    for row in rows(seen):
        judged += 1
        token = row[-1][0]
        run = next((n for n, (other, _) in enumerate(reversed(row)) if other != token), len(row))
        inside.update(other for other, _ in row[: len(row) - run])
        among.update(other for (other, _), (after, _) in pairwise(row[: len(row) - run]) if other == after)
        if run >= 2 and all(target is not None for _, target in row[-run:]):
            runs[token] += 1
            lengths.setdefault(token, set()).add(run)
    if not judged:
        raise NotApplicable("the targets are not the ids of the same batch, in the same order")
    for token, count in runs.items():
        if count >= 3 and len(lengths[token]) >= 2 and among[token] < count:
            words = f"{count} of {judged} sequences end in runs of token {token}, all of it among the targets"
            raise (Doubt if inside[token] else Violation)("no targets in the padding at the end of sequences", words)


@rule(
    "ignored-counted",
    "targets",
    why="A mean over all places, those without a target among them, makes the loss of a batch with few targets small: "
    "its tokens count less.",
    mend="Divide the sum by the number of targets that are not ignored.",
    source="litgpt#751",
)
def mean_over_targets(seen: Seen) -> None:
    """A mean loss counts only the positions that have a target."""
    found = [entropy for entropy, _, _ in of_training(seen.facts) if entropy.reduction == "none"]
    partly = [entropy for entropy in found if 0 < entropy.counted < entropy.targets.numel()]
    if not partly:
        raise NotApplicable("no cross entropy without reduction, and with ignored targets, was seen")
    losses = [loss.item() for backward in seen.facts.backwards for loss in backward.losses]
    means = [entropy.total / entropy.targets.numel() for entropy in partly]
    for k in range(1, 65):
        hits = sum(any(abs(loss * k - mean) < 1e-4 * abs(mean) for loss in losses) for mean in means)
        if hits == len(means) and len(means) > 1:
            entropy = partly[0]
            places = entropy.targets.numel()
            words = f"the sum is divided by all {places} places, of which {entropy.counted} have a target"
            raise Violation("a mean over targets", words)
