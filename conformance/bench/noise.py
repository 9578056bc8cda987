"""How far apart figures lie although nothing differs: in a pair of rows, during a run, and from one run to another.

The first is the noise floor: the ratio of a step to itself, interleaved round by round. Drift cancels in it. A row
that stands alone drifts, the device with its clock and the host with everything else: for one and the same fused AdamW
the host needed 0.4 to 1.2 ms within one run (reports/bench). So rows of two runs are compared with the drift of the
steps that were measured at several times of the run, and where a step waits for the host, with the host's drift, too.
"""

import math
from collections.abc import Callable

from conformance.bench.case import judged_by
from conformance.bench.summary import Beside, Key, Row, Summary

Part = tuple[str, str]
"""Group and size of a row."""


def noise_floor(summary: Summary) -> float:
    """Return how far from 1 the ratio of equals may lie, at 95 %; infinite if that was not measured."""
    noise = summary.card.noise
    return math.inf if noise is None else max(abs(noise.low - 1), abs(noise.high - 1))


def spreads(
    summary: Summary, own: Callable[[Row], float | None], other: Callable[[Beside], float]
) -> dict[Part, float]:
    """Return how far the medians of a step lie apart that was measured at several times of the run.

    Others are interleaved with such a step: it has a row of its own, and a median in each of these pairs.

    Args:
        summary: the run.
        own: the time in the step's own row.
        other: the time in the row that the step was measured beside.

    Returns:
        Largest over smallest median, minus 1, of the worst step of each group and size; of steps measured twice.
    """
    levels: dict[Key, list[float]] = {}
    for row in summary.measured:
        if (level := own(row)) is not None:
            levels.setdefault(row.key, []).append(level)
        if row.interleaved is not None:
            key = (row.group, row.size, row.interleaved.with_)
            levels.setdefault(key, []).append(other(row.interleaved))
    largest: dict[Part, float] = {}
    for (group, size, _), medians in levels.items():
        if len(medians) > 1:
            spread = max(medians) / min(medians) - 1
            largest[group, size] = max(largest.get((group, size), 0.0), spread)
    return largest


def device_drifts(summary: Summary) -> dict[Part, float]:
    """Return how far the judged time of one step drifted at most, by group and size."""
    return spreads(summary, lambda row: row.judged.median, lambda beside: beside.beside_ms)


def host_drifts(summary: Summary) -> dict[Part, float]:
    """Return how far the host's work for one step drifted at most, where the device time is judged."""
    found = spreads(summary, lambda row: row.host_ms, lambda beside: beside.beside_host_ms)
    return {part: drift for part, drift in found.items() if judged_by(part[0]) == "device"}


def card_difference(old: Summary, new: Summary, group: str) -> float:
    """Return by how much the card itself was faster in one of two runs.

    Two cards of a model are not equal, nor is one card at all times. The copy bandwidth shows it for optimizer steps,
    the rate of matrix products for training steps. Between models the difference is not noise, and 0 is returned.
    """
    if old.card.name != new.card.name:
        return 0.0
    if judged_by(group) == "device":
        before, after = old.card.copy_bandwidth, new.card.copy_bandwidth
    else:
        before, after = old.card.bf16_rate, new.card.bf16_rate
    return max(before, after) / min(before, after) - 1


def noise_between(old: Summary, new: Summary, key: Key) -> float:
    """Return the smallest meaningful difference between two runs of a row that both have.

    It is the noise floor or the drift within a run, whichever is larger, plus the difference between the cards. Where
    no step of the row's group and size was measured at several times, the largest drift of the run stands in for it.
    """
    found = [noise_floor(old), noise_floor(new)]
    for summary in (old, new):
        [row] = [row for row in summary.rows if row.key == key]
        for drifts in (device_drifts, host_drifts) if row.waits_for_host else (device_drifts,):
            known = drifts(summary)
            found.append(known.get(key[:2], max(known.values(), default=0.0)))
    return max(found) + card_difference(old, new, key[0])
