"""How far apart figures lie although nothing differs: in a pair of rows, during a run, and from one run to another.

The first is the noise floor: the ratio of a step to itself, interleaved round by round. Drift cancels in it. What
stands alone drifts: the device with its clock, and the host, which does not launch kernels equally fast at all times
(for one and the same fused AdamW 0.4 to 1.2 ms within one run: reports/bench). So rows of two runs are compared with
the drift of the steps that were measured at several times of the run; with the host's, too, where a step waits for the
host.
"""

import math
from collections.abc import Callable, Mapping, Sequence
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
        Largest over smallest median of the time that is judged, minus 1, by group, size and name; of steps that were
        measured twice.
    """
    return spreads(summary, "beside_ms", lambda row: row[f"{HEADLINE.get(row['group'], 'device')}_ms"]["median"])


def spreads(
    summary: Mapping[str, Any], beside_name: str, own: Callable[[Mapping[str, Any]], float]
) -> dict[tuple[str, str, str], float]:
    """As :func:`level_spreads`, of any time.

    Args:
        summary: the run.
        beside_name: the key of the time in the row that the step was measured beside.
        own: the time in the step's own row.
    """
    levels: dict[tuple[str, str, str], list[float]] = {}
    for row in summary["rows"]:
        if row.get("unavailable"):
            continue
        levels.setdefault((row["group"], row["size"], row["name"]), []).append(own(row))
        if beside := row.get("interleaved"):
            levels.setdefault((row["group"], row["size"], beside["with"]), []).append(beside[beside_name])
    return {key: max(medians) / min(medians) - 1 for key, medians in levels.items() if len(medians) > 1}


def device_drifts(summary: Mapping[str, Any]) -> dict[Part, float]:
    """How far the judged time of one step drifted at most, by group and size."""
    found: dict[Part, float] = {}
    for (group, size, _), spread in level_spreads(summary).items():
        found[group, size] = max(found.get((group, size), 0.0), spread)
    return found


def host_drifts(summary: Mapping[str, Any]) -> dict[Part, float]:
    """How far the host's work for one step drifted at most, by group and size; of groups judged by the device time."""
    found: dict[Part, float] = {}
    for (group, size, _), spread in spreads(summary, "beside_host_ms", lambda row: float(row["host_ms"])).items():
        if HEADLINE.get(group, "device") == "device":
            found[group, size] = max(found.get((group, size), 0.0), spread)
    return found


def card_difference(old: Mapping[str, Any], new: Mapping[str, Any], group: str) -> float:
    """By how much the card itself was faster in one of two runs: two of a model are not equal, nor is one at all times.

    Told by the copy bandwidth for what is judged by the device time, which is optimizer steps, and by the rate of
    matrix products for training steps. Between models it is no noise, and 0.
    """
    if old["card"]["name"] != new["card"]["name"]:
        return 0.0
    measure = "copy_bandwidth" if HEADLINE.get(group, "device") == "device" else "bf16_rate"
    before, after = old["card"][measure], new["card"][measure]
    return float(max(before, after) / min(before, after) - 1)


def noise_between(old: Mapping[str, Any], new: Mapping[str, Any], key: tuple[str, str, str]) -> float:
    """Below which difference of a row in two runs nothing can be said: the noise floor or the drift, and the card's.

    Args:
        old, new: the summaries.
        key: group, size and name of the row, which both have. Where no step of its group and size was measured at
            several times, the largest drift of the run stands in for it.
    """
    found = [noise_floor(old), noise_floor(new)]
    for summary in (old, new):
        [row] = [row for row in summary["rows"] if (row["group"], row["size"], row["name"]) == key]
        for drifts in (device_drifts, host_drifts) if row["waits_for_host"] else (device_drifts,):
            known = drifts(summary)
            found.append(known.get(key[:2], max(known.values(), default=0.0)))
    return max(found) + card_difference(old, new, key[0])
