"""Rules of what a run reports about itself: training loss, learning rate, gradient norm."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from conformance.errors import Violation

# Behind a name: "loss 4.8520", "loss train: 4.852", "{'grad_norm': '0.9402'", "lr=1.0e-04". Only numbers with a point
# or an exponent: counters are none.
NUMBER = r"\W{0,5}(\d+\.\d+(?:e[-+]?\d+)?|\d+e[-+]?\d+)(?![\d.]*\s*(?:%|m?s\b|sec|it/|tok))"
# The word before is bounded and begins as a word: without that, a long word takes time of its length squared.
BEFORE = r"(?:(?<![a-z])([a-z]{1,24})[ _/])?"
LOSS = re.compile(BEFORE + r"(?<![a-z])loss(?:[ _/]([a-z]+))?" + NUMBER, re.IGNORECASE)
# Lightning's LearningRateMonitor writes "lr-AdamW/pg1", and its grad_norm "grad_2.0_norm_total".
RATE = re.compile(r"(?<![a-z])(?:lr|learning[ _]rate)(?:-\w+(?:[ /]pg\d+)?)?" + NUMBER, re.IGNORECASE)
NORM = re.compile(r"(?<![a-z])(?:grad|gradient)(?:[ _]?norm|_2[ .]0_norm_total)" + NUMBER, re.IGNORECASE)
PROGRESS = re.compile(r"\b(?:step|iter|iteration|update|epoch)[ :=]{1,3}\d", re.IGNORECASE)
COUNTED = re.compile(r"\b(step|iter|iteration|update)[ :=]{1,3}(\d+)", re.IGNORECASE)
TARGETS = re.compile(
    r"(?:targets|(?:target|trainable|supervised|label)[ _]tokens)\W{1,5}(\d+(?:\.\d+)?)", re.IGNORECASE
)
OTHERS = {"val", "valid", "validation", "eval", "evaluation", "test", "dev", "aux", "auxiliary", "balance", "scale"}
OTHERS |= {"policy", "actor", "value", "critic", "entropy", "kl", "router", "d", "g", "disc", "gen"}
OTHERS |= {"discriminator", "generator"}
"""Words beside ``loss`` that make it another one than that of training: of other data, or a part of it."""


def training_losses(messages: Iterable[str]) -> list[str]:
    """Return the training losses in a run's messages, as they were written."""
    found = [match for line in messages for match in LOSS.findall(line)]
    return [number for before, after, number in found if not {before.lower(), after.lower()} & OTHERS]


def learning_rates(messages: Iterable[str]) -> list[str]:
    """Return the learning rates in what a run said about its progress; in settings that it printed it is the peak."""
    return [number for line in messages if is_progress(line) for number in RATE.findall(line)]


def gradient_norms(messages: Iterable[str]) -> list[str]:
    """Return the gradient norms in what a run said about its progress; in settings that it printed it is the limit."""
    return [number for line in messages if is_progress(line) for number in NORM.findall(line)]


def numbers_of_targets(messages: Iterable[str]) -> list[str]:
    """Return the numbers of targets of updates in a run's messages; plain tokens may be those that went in."""
    return [number for line in messages for number in TARGETS.findall(line)]


def last_numbers(messages: Iterable[str]) -> dict[str, int]:
    """Return the largest number of an update in lines that give its loss or rate, by the word before it (step, ...)."""
    found: dict[str, int] = {}
    for line in messages:
        if training_losses([line]) or learning_rates([line]):
            for word, number in COUNTED.findall(line):
                found[word.lower()] = max(int(number), found.get(word.lower(), 0))
    return found


def by_number(
    messages: Iterable[str], numbers: Callable[[Iterable[str]], list[str]]
) -> dict[str, list[tuple[int, list[str]]]]:
    """Return what lines report beside the number of an update, with that number, by the word before it.

    The words are "step" and "update": what an "iteration" is, a microbatch or an update, stacks do not agree on. If the
    step of a logger's row is the number of the iteration beside it, its rows count iterations, and say so: LitGPT's do.

    Args:
        messages: of a run; a logger's row begins with its step.
        numbers: finds what is wanted in a line, such as :func:`training_losses`.
    """
    counted = [(line, [(w.lower(), int(n)) for w, n in COUNTED.findall(line)]) for line in messages]
    counts_iterations = any(is_row(line) and is_iteration(pairs) for line, pairs in counted)
    found: dict[str, list[tuple[int, list[str]]]] = {}
    for line, pairs in counted:
        told = [] if counts_iterations and is_row(line) else numbers([line])
        for word, number in pairs if told else ():
            if word in ("step", "update"):
                found.setdefault(word, []).append((number, told))
    return found


def is_row(line: str) -> bool:
    """Return whether a message is a row of a logger."""
    return line.startswith("step ")


def is_iteration(pairs: Sequence[tuple[str, int]]) -> bool:
    """Return whether the step of a row is the number of its iteration, counted from 0 or from 1."""
    iterations = [number for word, number in pairs if word.startswith("iter")]
    return bool(iterations) and pairs[0][1] in (iterations[0], iterations[0] - 1)


def numbered_alike(pairs: Sequence[tuple[int, list[str]]], values: Mapping[int, Sequence[float]], what: str) -> None:
    """Check that what is reported with a number is of the update with that number, counted from 1 or from 0.

    >>> numbered_alike([(0, ["4.8"]), (1, ["4.7"])], {1: [4.8], 2: [4.7]}, "losses")

    Args:
        pairs: the number, and what is reported with it, as it was written.
        values: what may be reported of each update, counted from 1.
        what: is reported, for the message.

    Raises:
        Violation: with the numbers.
    """

    def right(number: int, texts: list[str]) -> bool:
        return any(is_rounded(text, value) for text in texts for value in values.get(number, ()))

    if not any(all(right(number + less, texts) for number, texts in pairs) for less in (0, 1)):
        raise Violation(
            f"{what} with the numbers of their own updates, which are {', '.join(map(str, values))}, counted from 1 "
            "or from 0",
            "reported: " + ", ".join(f"{texts[0]} with number {number}" for number, texts in pairs),
        )


def in_order(texts: Sequence[str], values: Sequence[float], what: str) -> None:
    """Check that what is reported of every update is that of the update, where there is one number for each.

    Raises:
        Violation: with the numbers.
    """
    fine = finest(texts)
    if len(fine) == len(values) and not all(map(is_rounded, fine, values)):
        listed = ", ".join(f"{value:.6g}" for value in values)
        raise Violation(f"{what} of {len(values)} updates in their order, {listed}", f"reported: {', '.join(fine)}")


def is_progress(line: str) -> bool:
    """Return True if a message is about an update, and not about settings."""
    return bool(PROGRESS.search(line) or training_losses([line]))


def is_rounded(text: str, value: float) -> bool:
    """Return True if a printed number is this value, rounded to as many digits as were printed."""
    return abs(float(text) - value) <= slack(text, value)


def slack(text: str, value: float) -> float:
    """Return by how much a printed number may differ from the value that it stands for."""
    digits, _, exponent = text.lower().partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
    return 0.5 * unit + 1e-6 * abs(value)


def finest(numbers: Sequence[str]) -> list[str]:
    """Return numbers without those that are another one, rounded to fewer digits, such as printed ones beside logged.

    >>> finest(["4.84", "4.8375", "2.71"])
    ['4.8375', '2.71']
    """

    def is_coarser(text: str, other: str) -> bool:
        return slack(text, 0.0) > slack(other, 0.0) and is_rounded(text, float(other))

    return [text for text in numbers if not any(is_coarser(text, other) for other in numbers)]


def matches_by_chance(numbers: Sequence[str], values: Sequence[float]) -> float:
    """Return how many numbers one would expect to equal some value by chance: of those that lie among the values."""
    low, high = min(values), max(values)
    among = [number for number in numbers if low - slack(number, low) <= float(number) <= high + slack(number, high)]
    covered = sum(2 * slack(number, low) * len(values) for number in among)
    return covered / (high - low) if high > low else float(len(among))


def one_is_among(numbers: Sequence[str], values: Iterable[float], what: str) -> None:
    """Check that one of the numbers reported is one of these values, rounded.

    Args:
        numbers: as they were printed.
        values: what they may be.
        what: is expected, for the message.

    Raises:
        Violation: with the numbers.
    """
    allowed = list(values)
    if not any(is_rounded(number, value) for number in numbers for value in allowed):
        raise Violation(what, f"reported: {', '.join(dict.fromkeys(numbers))}")
