"""Rules of the learning rate."""

from collections.abc import Mapping, Sequence

from conformance.errors import Violation
from conformance.recording.trace import Group

RATE_BOUND = 1e-6  # relative: schedules are computed in float64, and some are kept in float32


def rates_are(
    updates: Sequence[Sequence[Group]], declared: Sequence[Mapping[str, float]], what: str = "learning rates"
) -> None:
    """Check that the learning rate of every tensor in every update is the declared one.

    Args:
        updates: the parameter groups of each update.
        declared: for each, the rate of each tensor by name.
        what: what they are, for the message.

    Raises:
        Violation: with the first update that differs, and all rates of the tensor that does.
    """
    if len(updates) != len(declared):
        raise Violation(f"{what} of {len(declared)} updates", f"{len(updates)} updates")
    for number, (groups, rates) in enumerate(zip(updates, declared, strict=True), start=1):
        for name, found in rates_of(groups).items():
            if name in rates and not abs(found - rates[name]) <= RATE_BOUND * abs(rates[name]):
                seen = [f"{rates_of(other).get(name, float('nan')):.6g}" for other in updates]
                raise Violation(
                    f"{what} {', '.join(f'{other[name]:.6g}' for other in declared)} for {name}",
                    f"{', '.join(seen)}, which differ from update {number} on",
                )


def rates_of(groups: Sequence[Group]) -> dict[str, float]:
    """Return the learning rate of each tensor."""
    return {name: float(group.settings.get("lr", float("nan"))) for group in groups for name in group.tensors}
