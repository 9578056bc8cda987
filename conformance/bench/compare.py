"""Two runs beside each other: faster, slower or ambiguous, row by row."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from conformance.bench.bootstrap import Interval, Verdict, ratio_of_medians, verdict
from conformance.bench.card import differences
from conformance.bench.summary import HEADLINE, Row, noise_floor
from conformance.subject import UsageError


@dataclass(frozen=True)
class Comparison:
    """One row in both runs."""

    key: tuple[str, str, str]
    clock: str
    """Which time was compared: ``device`` or ``wall``."""
    ratio: Interval
    """New time over old time."""
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
    noise = max(noise_floor(old), noise_floor(new))
    before = {key_of(row): row for row in old["rows"] if not row["unavailable"]}
    found = []
    for row in new["rows"]:
        if row["unavailable"] or key_of(row) not in before:
            continue
        clock = HEADLINE.get(row["group"], "device")
        now, then = row["samples_ms"][clock], before[key_of(row)]["samples_ms"][clock]
        ratio = ratio_of_medians(now, then)
        found.append(Comparison(key_of(row), clock, ratio, verdict(ratio, noise, min(len(now), len(then)))))
    return found


def key_of(row: Row) -> tuple[str, str, str]:
    """What identifies a row from run to run."""
    return row["group"], row["size"], row["name"]
