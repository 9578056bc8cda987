"""Rules of the learning rate."""

from collections.abc import Sequence

from conformance.errors import Violation
from conformance.recording.trace import Group

RATE_BOUND = 1e-6  # relative: schedules are computed in float64, and some are kept in float32


def rates_are(updates: Sequence[Sequence[Group]], declared: Sequence[float], what: str = "learning rates") -> None:
    """Check that the learning rate of every update, in every group, is the declared one.

    Args:
        updates: the parameter groups of each update.
        declared: one rate for each.
        what: what they are, for the message.

    Raises:
        Violation: with the first update that differs, and all rates.
    """
    if len(updates) != len(declared):
        raise Violation(f"{len(declared)} updates", f"{len(updates)}")
    for number, (groups, rate) in enumerate(zip(updates, declared, strict=True), start=1):
        for group in groups:
            found = float(group.settings.get("lr", float("nan")))
            if not abs(found - rate) <= RATE_BOUND * abs(rate):
                seen = [f"{float(other[0].settings.get('lr', float('nan'))):.6g}" for other in updates]
                raise Violation(
                    f"{what} {', '.join(f'{value:.6g}' for value in declared)}",
                    f"{', '.join(seen)}: another from update {number} on",
                )
