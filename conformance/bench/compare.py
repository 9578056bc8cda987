"""Two runs beside each other: faster, slower or ambiguous, row by row."""

from collections.abc import Mapping
from dataclasses import dataclass

from conformance.bench.bootstrap import Interval, Verdict, ratio_of_medians, verdict
from conformance.bench.case import Which, judged_by
from conformance.bench.noise import noise_between
from conformance.bench.summary import Key, Row, Summary
from conformance.errors import UsageError

# What must be equal for two runs to be compared: the card and what computes. The suite's own version may differ: it is
# what is compared.
MUST_AGREE = (
    *("gpu", "driver", "cuda", "python", "torch", "triton", "lightning", "bitsandbytes", "grokadamw", "torchao"),
    *("litgpt", "transformers", "x-transformers"),
)


@dataclass(frozen=True)
class Comparison:
    """One row in both runs."""

    key: Key
    clock: Which  # which time was compared
    ratio: Interval  # new time over old time
    noise: float  # the smallest difference that means anything
    verdict: Verdict


def check_comparable(old: Summary, environment: Mapping[str, str], small: bool) -> None:
    """Raise UsageError if card or versions differ from those of an earlier run.

    Args:
        old: the earlier run.
        environment: of the later one.
        small: whether the later one is small, on the CPU.
    """
    unknown = "unknown"
    found = ["one ran small on the CPU"] if bool(old.label) != small else []
    for name in MUST_AGREE:
        before, after = old.environment.get(name, unknown), environment.get(name, unknown)
        if before != after:
            found.append(f"{name} {before} and {after}")
    if found:
        raise UsageError(
            f"the two runs differ in more than what is measured ({'; '.join(found)}): run the older one "
            "again here, or add --across to compare them anyway."
        )


def compare(old: Summary, new: Summary) -> list[Comparison]:
    """Compare every row that was measured in both runs."""
    before: dict[Key, Row] = {row.key: row for row in old.measured}
    found = []
    for row in new.measured:
        if row.key in before:
            now, then = row.judged_samples, before[row.key].judged_samples
            ratio, noise = ratio_of_medians(now, then), noise_between(old, new, row.key)
            answer = verdict(ratio, noise, min(len(now), len(then)))
            found.append(Comparison(row.key, judged_by(row.group), ratio, noise, answer))
    return found


def only_in(one: Summary, other: Summary) -> list[str]:
    """Name the rows that were measured in one run and not in the other."""
    there = {row.key for row in other.measured}
    return [", ".join(row.key) for row in one.measured if row.key not in there]
