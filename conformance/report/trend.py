"""What changed between two releases of a stack, where both were judged."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby, pairwise

from conformance.report.result import Report

FAILED = ("fail", "error")


@dataclass(frozen=True)
class Trend:
    """Two releases of one stack, judged on the same kind of machine."""

    older: Report
    newer: Report

    @property
    def mended(self) -> list[str]:
        """Clauses that the older release failed and the newer one passes."""
        return [name for name, was, now in self.both() if was in FAILED and now == "pass"]

    @property
    def broken(self) -> list[str]:
        """Clauses that the older release passed and the newer one fails."""
        return [name for name, was, now in self.both() if was == "pass" and now in FAILED]

    @property
    def failed_by_both(self) -> list[str]:
        """Clauses that both fail."""
        return [name for name, was, now in self.both() if was in FAILED and now in FAILED]

    def both(self) -> list[tuple[str, str, str]]:
        """Return id and outcomes of the clauses that both were judged by."""
        found = self.newer.verdicts
        return [(name, was.outcome, found[name].outcome) for name, was in self.older.verdicts.items() if name in found]


def trends(reports: Iterable[Report]) -> list[Trend]:
    """Return what changed from each judged release of a stack to the next, by stack and release."""
    ordered = sorted(reports, key=lambda report: (*stack_of(report), release_order(report.version)))
    pairs = (pair for _, same in groupby(ordered, key=stack_of) for pair in pairwise(same))
    return [Trend(*pair) for pair in pairs if pair[0].version != pair[1].version]


def stack_of(report: Report) -> tuple[str, bool]:
    """Return what two reports must have in common to be compared: the stack, and whether a GPU was used."""
    return report.name, report.environment.get("gpu", "none") != "none"


def release_order(version: str) -> list[tuple[int, str]]:
    """Return a key that sorts releases by their numbers: 5.3 comes before 5.24."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.findall(r"\d+|[a-z]+", version.lower())]
