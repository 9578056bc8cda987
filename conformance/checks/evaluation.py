"""Rules of evaluation."""

import re
from collections.abc import Iterable, Sequence

from conformance.checks.reports import one_is_among

# "validation 4.8520", "val loss: 4.852", "{'eval_loss': '4.852'", but not "eval_runtime: 0.0137", nor the percentage,
# the seconds or the speed of a progress bar.
REPORTED = re.compile(
    r"\b(?:val|valid|validation|eval|evaluation)(?:[ _/]?loss)?\W{0,5}(\d+\.\d+(?:e[-+]?\d+)?)"
    r"(?![\d.]*\s*(?:%|m?s\b|sec|min|it/|tok))",
    re.IGNORECASE,
)


def reported_losses(messages: Iterable[str]) -> list[str]:
    """Return the validation losses in a run's messages, as they were written."""
    return [number for line in messages for number in REPORTED.findall(line)]


def reports(messages: Sequence[str], expected: float) -> None:
    """Check that some message gives the validation loss, and that it is the expected one.

    Raises:
        Violation: with the numbers that the messages give instead.
    """
    one_is_among(
        reported_losses(messages),
        [expected],
        f"a validation loss of {expected:.6f}, the mean cross entropy of the next tokens over all logits evaluated",
    )
