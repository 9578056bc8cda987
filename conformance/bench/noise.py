"""How far apart figures lie although nothing differs: within a pair of rows, and from one time of a run to another.

The first is the noise floor: the ratio of a step to itself, interleaved round by round. Drift cancels in it. What
stands alone drifts, mostly with the host, which does not launch kernels equally fast all the time: on an H100 one and
the same fused AdamW took 1.75 to 2.22 ms in one run, beside other optimizers (reports/bench). So rows of two runs are
compared with the second kind, which is larger the more of its time a step waits for the host.
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


def level_spreads(summary: Mapping[str, Any]) -> dict[tuple[str, str, str], float]:
    """How far the medians of one and the same step lie apart, which was measured at several times of the run.

    Such a step is one that others are interleaved with: it has a row of its own, and a median in each of these pairs.

    Returns:
        Largest over smallest median, minus 1, by group, size and name; of steps that were measured twice.
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
    return {key: max(medians) / min(medians) - 1 for key, medians in levels.items() if len(medians) > 1}


def host_share(row: Mapping[str, Any]) -> float:
    """The share of its time, at most 1, that a step needs on the host. All of it where the wall is judged."""
    if HEADLINE.get(row["group"]) == "wall":
        return 1.0
    return min(1.0, float(row["host_ms"] / row["device_ms"]["median"]))


def drifts(summary: Mapping[str, Any]) -> dict[Part, float]:
    """How far the time of a step that is all host would have drifted, by group and size: from :func:`level_spreads`."""
    found: dict[Part, float] = {}
    spreads = level_spreads(summary)
    for row in summary["rows"]:
        part = row["group"], row["size"]
        key = (*part, row["name"])
        if key in spreads and not row.get("unavailable"):
            found[part] = max(found.get(part, 0.0), spreads[key] / host_share(row))
    return found


def noise_between(old: Mapping[str, Any], new: Mapping[str, Any], key: tuple[str, str, str]) -> float:
    """Below which difference of a row in two runs nothing can be said.

    Args:
        old, new: the summaries.
        key: group, size and name of the row, which both have. Where no step of its group and size was measured at
            several times, the largest drift of the run stands in for it.
    """
    share = max(
        host_share(row)
        for summary in (old, new)
        for row in summary["rows"]
        if (row["group"], row["size"], row["name"]) == key
    )
    known = [(found.get(key[:2]), max(found.values(), default=0.0)) for found in map(drifts, (old, new))]
    drift = max(largest if own is None else own for own, largest in known)
    return max(noise_floor(old), noise_floor(new), drift * share)
