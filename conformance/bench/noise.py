"""How far apart figures lie although nothing differs: within a pair of rows, and from one time of a run to another.

The first is the noise floor: the ratio of a step to itself, interleaved round by round. Drift cancels in it. What
stands alone drifts: on an H100 one and the same fused AdamW took 2.03 ms in one row and 1.76 ms in the next, because
the host launched it more slowly. So two runs are compared with the second kind, which is larger.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from conformance.bench.case import HEADLINE
from conformance.bench.optimizer_step import AGAINST_ITSELF

Part = tuple[str, str]
"""Group and size of a row."""


def noise_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """The ratio of the row that measured a step against itself; None if it was not measured."""
    for row in rows:
        if row["name"].endswith(AGAINST_ITSELF) and row["interleaved"]:
            return {key: row["interleaved"][key] for key in ("ratio", "low", "high")}
    return None


def noise_floor(summary: Mapping[str, Any]) -> float:
    """How far from 1 the ratio of equals may lie, at 95 %; infinite if it was not measured, so that nothing is said."""
    noise = summary["card"]["noise"]
    return math.inf if noise is None else float(max(abs(noise["low"] - 1), abs(noise["high"] - 1)))


def level_spreads(summary: Mapping[str, Any]) -> dict[Part, float]:
    """How far the medians of one and the same step lie apart, which was measured at several times of the run.

    Such a step is one that others are interleaved with: it has a row of its own, and a median in each of these pairs.

    Returns:
        Largest over smallest median, minus 1, by group and size; none where no step was measured twice.
    """
    levels: dict[tuple[str, str, str], list[float]] = {}
    for row in summary["rows"]:
        if row.get("unavailable"):
            continue
        own = row[f"{HEADLINE.get(row['group'], 'device')}_ms"]["median"]
        levels.setdefault((row["group"], row["size"], row["name"]), []).append(own)
        beside = row.get("interleaved") or {}
        if "beside_ms" in beside:  # a summary from before November 2026 has none
            levels.setdefault((row["group"], row["size"], beside["with"]), []).append(beside["beside_ms"])
    found: dict[Part, float] = {}
    for (group, size, _), medians in levels.items():
        if len(medians) > 1:
            found[group, size] = max(found.get((group, size), 0.0), max(medians) / min(medians) - 1)
    return found


def noise_between(old: Mapping[str, Any], new: Mapping[str, Any], part: Part) -> float:
    """Below which difference of a row in two runs nothing can be said.

    Args:
        old, new: the summaries.
        part: group and size of the row. Where no step of that part was measured at several times, the largest spread
            of the run stands in for it.
    """
    runs = (old, new)
    drifts = (spreads.get(part, max(spreads.values(), default=0.0)) for spreads in map(level_spreads, runs))
    return max(*map(noise_floor, runs), *drifts)
