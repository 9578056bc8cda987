"""Rules of evaluation."""

import re
from collections.abc import Iterable, Sequence

from conformance.checks.reports import one_is_among
from conformance.errors import Violation, quoted

# "validation 4.8520", "val loss: 4.852", "{'eval_loss': '4.852'", "validate step: 2 loss: 4.852", but not
# "eval_runtime: 0.0137", nor the percentage, the seconds or the speed of a progress bar.
REPORTED = re.compile(
    r"\b(?:val|valid|validate|validation|eval|evaluation)(?:[ _]metrics)?(?: (?:step|iter)\W{1,4}\d+,?)?"
    r"(?:\s{0,4}[ _/]?loss)?\W{0,5}(\d+\.\d+(?:e[-+]?\d+)?)"
    r"(?![\d.]*\s*(?:%|m?s\b|sec|min|it/|tok))",
    re.IGNORECASE,
)

LOGGED = re.compile(r"step (\d+): ")  # as conformance.recording.metrics writes what a logger got


def reported_losses(messages: Iterable[str]) -> list[str]:
    """Return the validation losses in a run's messages, as they were written."""
    return [number for line in messages for number in REPORTED.findall(line)]


def validation_losses_by_step(messages: Iterable[str]) -> dict[int, str]:
    """Return what loggers got as the validation loss, as it was written, by the number that they got with it."""
    lines = [(match.group(1), line[match.end() :]) for line in messages if (match := LOGGED.match(line))]
    return {int(step): losses[-1] for step, line in lines if (losses := REPORTED.findall(line))}


def reports(messages: Sequence[str], expected: float, over: str = "logits evaluated", where: str = "") -> None:
    """Check that some message gives the validation loss, and that it is the expected one.

    Args:
        messages: of the run.
        expected: the loss.
        over: what the mean is over, for the message.
        where: begins the message.

    Raises:
        Violation: with the numbers that the messages give instead.
    """
    one_is_among(
        reported_losses(messages),
        [expected],
        f"{where}a validation loss of {expected:.6f}, the mean cross entropy of the next tokens over all {over}",
    )


def modes_agree(training: Sequence[Sequence[str]], evaluation: Sequence[Sequence[str]]) -> None:
    """Check the modes of submodules.

    Args:
        training: of each forward in training, the submodules whose mode is not the model's. A part may be meant to stay
            in eval mode, but then from the beginning.
        evaluation: the same of each forward in evaluation, where the model is in eval mode.

    Raises:
        Violation: naming submodules.
    """
    if awake := sorted({name for names in evaluation for name in names}):
        raise Violation("every submodule in eval mode during evaluation", f"in training mode: {quoted(awake)}")
    for later in training:
        if changed := sorted(set(later) ^ set(training[0])):
            left = "left in eval mode" if set(changed) <= set(later) else "switched to training mode"
            raise Violation(
                "every submodule has the mode in training that it had at first", f"{left}: {quoted(changed)}"
            )
