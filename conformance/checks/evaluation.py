"""Rules of evaluation."""

import re
from collections.abc import Iterable, Sequence

from conformance.clause import Violation

# "validation 4.8520", "val loss: 4.852", "{'eval_loss': '4.852'", but not "eval_runtime: 0.0137", nor the percentage,
# the seconds or the speed of a progress bar.
REPORTED = re.compile(
    r"\b(?:val|valid|validation|eval|evaluation)(?:[ _/]?loss)?\W{0,5}(\d+\.\d+(?:e[-+]?\d+)?)"
    r"(?![\d.]*\s*(?:%|m?s\b|sec|min|it/|tok))",
    re.IGNORECASE,
)


def reported_losses(messages: Iterable[str]) -> list[str]:
    """The validation losses in what a run said, as they stand there."""
    return [number for line in messages for number in REPORTED.findall(line)]


def is_rounded(text: str, value: float) -> bool:
    """Whether a printed number is this value, rounded to as many digits as were printed."""
    digits, _, exponent = text.lower().partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
    return abs(float(text) - value) <= 0.5 * unit + 1e-6 * abs(value)


def reports(messages: Sequence[str], expected: float) -> None:
    """Some message gives the validation loss, and it is this one.

    Raises:
        Violation: with the numbers that the messages give instead.
    """
    found = reported_losses(messages)
    if not any(is_rounded(number, expected) for number in found):
        raise Violation(
            f"a validation loss of {expected:.6f}, the mean cross entropy of the next tokens over all logits evaluated",
            f"reported: {', '.join(dict.fromkeys(found))}",
        )
