"""The loss: how it is computed, and what the run says about it."""

import re
from collections.abc import Iterable

import torch

from conformance.auditing.entropies import of_training, shares
from conformance.auditing.facts import Facts, Given
from conformance.auditing.rule import Doubt, Seen, rule
from conformance.checks.reports import is_rounded, training_losses
from conformance.errors import NotApplicable, Violation

COARSE = (torch.bfloat16, torch.float16)


def inputs(facts: Facts) -> list[Given]:
    """Return what the cross entropies of training were given."""
    found = [given for _, given, _ in of_training(facts) if given is not None]
    if not found:
        raise NotApplicable("every cross entropy was computed from something else than a matrix")
    return found


@rule(
    "loss-input",
    "loss",
    why="cross_entropy takes the softmax itself. Given probabilities it takes it twice: the loss cannot fall below "
    "about ln V - 1, and training stalls without an error.",
    mend="Give cross_entropy the raw logits, or nll_loss the output of log_softmax.",
    source="pytorch forum: softmax before CrossEntropyLoss",
)
def given_logits(seen: Seen) -> None:
    """Cross entropy is given logits, and nll_loss is given log-probabilities."""
    for given in inputs(seen.facts):
        if given.lowest is None or given.sums is None or given.exponential_sums is None:
            continue  # one of many in its backward pass, whose first ones have figures
        if given.name == "cross_entropy":
            ones = bool(((given.sums - 1).abs() < 1e-2).all())
            if ones and bool(given.lowest >= 0):
                raise Violation(
                    "logits in cross_entropy", "its rows are probabilities: none is below 0, and each adds up to 1"
                )
        elif not bool((given.exponential_sums.abs() < 5e-2).all()):
            raise Violation(
                "log-probabilities in nll_loss",
                f"the exponentials of a row add up to {given.exponential_sums[0].exp().item():.3g}, not to 1",
            )


@rule(
    "loss-precision",
    "loss",
    why="In 16 bits a loss near 10 moves in steps of 0.06, and its gradient is as coarse.",
    mend="Convert the logits to float32 before the loss, or compute it under autocast, which does.",
    source="litgpt#1937, nanoGPT#303",
)
def float32_loss(seen: Seen) -> None:
    """The loss of training is computed in float32."""
    entropies = [entropy for entropy, _, _ in of_training(seen.facts)]
    bad = [entropy for entropy in entropies if entropy.dtype in COARSE]
    if bad:
        raise Violation("a cross entropy in float32", f"{len(bad)} of {len(entropies)} are computed in {bad[0].dtype}")


@rule(
    "loss-finite",
    "loss",
    why="A loss that is NaN has no gradient; one NaN step spoils every weight.",
    mend="Look for a batch without targets (a mean over nothing), logits that overflow in 16 bits, or a rate too high.",
    source="transformers#31312",
)
def finite_loss(seen: Seen) -> None:
    """Every loss is a finite number."""
    found = [loss for backward in seen.facts.backwards for loss in backward.losses]
    if not found:
        raise NotApplicable("no backward was seen")
    bad = sum(not bool(loss.isfinite()) for loss in found)
    if bad and not any(update.skipped for update in seen.facts.updates):
        raise Violation("finite losses", f"{bad} of {len(found)} are NaN or infinite")


@rule(
    "first-counted",
    "loss",
    why="Nothing predicts the first token of a sequence, so it has no loss. Counted in the mean, it makes loss and "
    "gradient too small by one part in the sequence's length, and the loss differs from every other trainer's.",
    mend="Count the targets after the shift: those that the cross entropy does not ignore.",
    source="transformers#46204 (GPT-2 still)",
    advice=True,
)
def targets_counted(seen: Seen) -> None:
    """A sum of losses is divided by the number of its targets."""
    facts = seen.facts
    if facts.world > 1:
        raise NotApplicable("the processes share one count of targets, and only this one's targets were compared")
    if any(entropy.reduction != "sum" for entropy, _, _ in of_training(facts)):
        raise NotApplicable("the cross entropy takes the mean by itself")
    for number, update in enumerate(shares(facts)):
        counted = sum(targets for _, targets in update)
        rows = sum(len(forward.ids) for forward in facts.trace.training_forwards(number))
        divisors = [1 / weight for weight, _ in update]
        if any(abs(divisor - counted) < 0.1 * rows for divisor in divisors):
            continue
        if all(abs(divisor - counted - rows) < 0.1 * rows for divisor in divisors):
            raise Violation(
                f"a loss that is divided by its {counted} targets, in update {number + 1}",
                f"it is divided by {counted + rows}: one more for each of {rows} sequences",
            )
        raise NotApplicable("the sum is divided by something else than a number of targets")


@rule(
    "told-loss",
    "loss",
    why="Whoever reads the curve reads another loss than the one that is trained, and compares runs by it.",
    mend="Report the mean over the update's targets: undo the division by the number of microbatches, add all "
    "microbatches up, and average over processes.",
    source="nanoGPT: the loss of the last microbatch is printed; litgpt#1971",
    together=True,
)
def told_loss(seen: Seen) -> None:
    """The training loss that the run prints is the loss of the whole update."""
    facts = seen.facts
    numbers = told(facts)
    if not numbers:
        raise NotApplicable("no line with a training loss was printed or logged")
    (means, parts), ranks = values(facts), [values(rank)[0] for rank in seen.ranks if rank.reported]
    if not means:
        raise NotApplicable("no loss was seen: there was no cross entropy and no backward")
    running = [sum(means[start:end]) / (end - start) for end in range(1, len(means) + 1) for start in range(end)]
    across = [sum(group) / len(group) for group in zip(*ranks, strict=False)]
    evaluated = [*evaluation_means(facts), *(value for rank in ranks[1:] for value in rank)]
    several = any(step.evaluations > 1 for update in facts.updates for step in update.steps)
    known = (*running, *across, *evaluated, *(parts if several else ()))
    right = [number for number in numbers if any(is_rounded(number, value) for value in known)]
    if len(right) == len(numbers):
        check_all_processes(numbers, means, across, seen)
        return
    wrong = [number for number in numbers if number not in right]
    own = list(dict.fromkeys(f"{value:.4f}" for value in means))  # several ways to add up may give the same
    expected = f"printed losses that are the update's: {', '.join(own[:6])}"
    expected += f" and {len(own) - 6} more" * (len(own) > 6)
    said = f"printed: {', '.join(wrong[:6])}"
    if all(any(is_rounded(number, value) for value in parts) for number in wrong):
        raise Doubt(expected, f"{said}, each the loss of one microbatch")
    ratios = [ratio for number in wrong for ratio in [ratio_to(float(number), means)] if ratio]
    if len(ratios) == len(wrong) and len(wrong) >= 2 and max(ratios) - min(ratios) < 0.02 * max(ratios):
        raise Violation(expected, f"{said}, {ratios[0]:.3g} times as large")
    raise Doubt(expected, said)


def check_all_processes(numbers: list[str], means: list[float], across: list[float], seen: Seen) -> None:
    """Raise Doubt if each printed loss is that of process 0 alone, though the processes' losses differ."""
    if len(seen.ranks) < 2 or not all(rank.reported for rank in seen.ranks):
        return
    if any(is_rounded(number, value) for number in numbers for value in across):
        return
    if all(any(is_rounded(number, value) for value in means) for number in numbers):
        raise Doubt("printed losses that are the mean over all processes", "each is the loss of process 0 alone")


def evaluation_means(facts: Facts) -> list[float]:
    """Return the means over stretches of the losses that were computed without gradients, between two updates."""
    found: list[float] = []
    for number in range(len(facts.updates) + 1):
        own = [e for e in facts.trace.entropies if not e.grad_enabled and e.update == number and e.counted]
        losses = [e.total / e.counted for e in own][:256]
        for start in range(len(losses)):
            total = 0.0
            for end in range(start, len(losses)):
                total += losses[end]
                found.append(total / (end + 1 - start))
    return found


def ratio_to(number: float, means: list[float]) -> float:
    """Return by how much a number is larger than the nearest mean, as 1/k or k for a small k; 0 if by neither.

    0 too if it nearly is a mean: a moving average is, and so is the loss of one of several microbatches.
    """
    if any(abs(number - mean) < 1e-3 * abs(mean) for mean in means):
        return 0.0
    for k in range(2, 129):
        for factor in (1 / k, float(k)):
            if any(abs(number - factor * mean) < 1e-3 * abs(factor * mean) for mean in means):
                return factor
    return 0.0


def is_multiple(value: float, mean: float) -> bool:
    """Return True if a value is a mean times or divided by a small number, or by a scaler's power of 2."""
    factor = max(abs(value / mean), abs(mean / value)) if value and mean else 0.0
    near = max(round(factor), 1)
    return abs(factor - near) < 1e-3 * near and (near <= 128 or near.bit_count() == 1)


def told(facts: Facts) -> list[str]:
    """Return the training losses that were said from the first recorded update on, as they were written."""
    texts: Iterable[str] = (said.text for said in facts.said if said.update >= 1)
    return [number for text in texts for number in training_losses([re.sub(r"\x1b\[[0-9;]*m", "", text)])]


def values(facts: Facts) -> tuple[list[float], list[float]]:
    """Return the mean loss of each update, and the loss of each microbatch, undivided and as it was."""
    entropies = [e for e in facts.trace.entropies if e.grad_enabled and e.counted and e.value.ndim == 0]
    means, parts = [], [loss.item() for backward in facts.backwards for loss in backward.losses]
    updates = 1 + max((backward.update for backward in facts.backwards), default=-1)
    for number in range(updates):
        own = [entropy for entropy in entropies if entropy.update == number]
        if own:
            means.append(sum(e.total for e in own) / sum(e.counted for e in own))
            means.append(sum(e.total / e.counted for e in own) / len(own))
            parts += [e.total / e.counted for e in own]
            passes = [loss.item() for b in facts.backwards if b.update == number for loss in b.losses]
            trained = sum(passes)
            if abs(trained - means[-1]) < 0.2 * abs(means[-1]):  # with what else is in the loss, such as a z-loss
                means += [trained, trained]
            elif trained and not is_multiple(trained, means[-1]):  # a sum of several losses, as in distillation
                means += [trained, trained, trained / len(passes), trained / len(passes)]
            if len(passes) == 1 and len(own) > 1:  # one of several heads
                means += [e.total / e.counted for e in own for _ in range(2)]
            if any(update == number for update, _ in facts.noticed.cleared):  # SAM: only one of them is trained on
                means += [part for part in passes for _ in range(2)]
        else:
            losses = [loss.item() for b in facts.backwards if b.update == number for loss in b.losses]
            means += [sum(losses), sum(losses) / max(len(losses), 1)]
    return means, parts
