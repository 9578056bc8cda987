"""Two runs beside each other: faster, slower or ambiguous, row by row."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conformance.bench.bootstrap import Interval, Verdict, ratio_of_medians, verdict
from conformance.bench.card import differences
from conformance.bench.case import HEADLINE
from conformance.bench.noise import noise_between
from conformance.bench.summary import Row, read_summary
from conformance.subject import UsageError


def read_comparable(path: Path) -> dict[str, Any]:
    """A summary that an earlier run wrote, with all that a comparison reads.

    Raises:
        UsageError: if the file is none, or is damaged.
    """
    summary = read_summary(path)
    if not is_whole(summary):
        raise UsageError(f"the summary {path} is damaged: give it as the bench wrote it, or run the bench again.")
    return summary


def is_whole(summary: Mapping[str, Any]) -> bool:
    """Whether a summary has what a comparison reads, in the types that it expects."""

    def numbers(values: object) -> bool:
        return isinstance(values, list) and bool(values) and all(isinstance(v, int | float) and v > 0 for v in values)

    def row(row: object) -> bool:
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("group", "size", "name")):
            return False
        if row.get("unavailable"):
            return True
        samples, beside = row.get("samples_ms"), row.get("interleaved") or {}
        medians = [
            row[key].get("median") if isinstance(row.get(key), dict) else None for key in ("device_ms", "wall_ms")
        ]
        if not isinstance(beside, dict) or not numbers([*medians, row.get("host_ms")]):
            return False
        if beside and not (
            isinstance(beside.get("with"), str) and numbers([beside.get("beside_ms"), beside.get("beside_host_ms")])
        ):
            return False
        if "waits_for_host" not in row or not isinstance(row["waits_for_host"], bool | None):
            return False
        return isinstance(samples, dict) and numbers(samples.get("device")) and numbers(samples.get("wall"))

    card, rows, environment = summary["card"], summary["rows"], summary["environment"]
    if not isinstance(card, dict) or not isinstance(rows, list) or not isinstance(environment, dict):
        return False
    if not numbers([card.get("copy_bandwidth"), card.get("bf16_rate")]) or not isinstance(card.get("name"), str):
        return False
    noise = card.get("noise", False)  # None where it was not measured
    if noise is not None and not (isinstance(noise, dict) and numbers([noise.get("low"), noise.get("high")])):
        return False
    return all(map(row, rows))


@dataclass(frozen=True)
class Comparison:
    """One row in both runs."""

    key: tuple[str, str, str]
    clock: str
    """Which time was compared: ``device`` or ``wall``."""
    ratio: Interval
    """New time over old time."""
    noise: float
    """Differences below are none."""
    verdict: Verdict


def check_comparable(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise UsageError if card or versions of the runs differ."""
    found = differences(old["environment"], new["environment"])
    if bool(old.get("label")) != bool(new.get("label")):
        found.insert(0, "one ran small on the CPU")
    if found:
        raise UsageError(
            f"the two runs differ in more than what is measured ({'; '.join(found)}): "
            "repeat the older one here, or add --across to compare nevertheless."
        )


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Comparison]:
    """Every row that was measured in both runs."""
    before = {key_of(row): row for row in measured(old)}
    found = []
    for row in measured(new):
        if key_of(row) not in before:
            continue
        clock = HEADLINE.get(row["group"], "device")
        now, then = row["samples_ms"][clock], before[key_of(row)]["samples_ms"][clock]
        ratio = ratio_of_medians(now, then)
        noise = noise_between(old, new, key_of(row))
        answer = verdict(ratio, noise, min(len(now), len(then)))
        found.append(Comparison(key_of(row), clock, ratio, noise, answer))
    return found


def measured(summary: Mapping[str, Any]) -> list[Row]:
    """The rows that have figures."""
    return [row for row in summary["rows"] if not row.get("unavailable")]


def only_in(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Rows that were measured in one run and not in the other, in words."""
    there = {key_of(row) for row in measured(other)}
    return ["{}, {}, {}".format(*key_of(row)) for row in measured(one) if key_of(row) not in there]


def key_of(row: Row) -> tuple[str, str, str]:
    """What identifies a row from run to run."""
    return row["group"], row["size"], row["name"]
