"""From measurements to rows, and from rows to summary.json."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from conformance.bench.bootstrap import Interval, median_interval, paired_ratio
from conformance.bench.card import Card
from conformance.bench.case import HEADLINE, Case, Setting
from conformance.bench.measure import Measurement, doubts_about
from conformance.bench.noise import noise_of
from conformance.bench.throughput import throughput
from conformance.subject import UsageError

SCHEMA = 2
SMALL = "CPU, small: no figure of this run says anything about a GPU"

Row = dict[str, Any]


def interval_ms(samples: Sequence[float]) -> dict[str, float]:
    """Median and interval of seconds, in milliseconds."""
    return asdict(median_interval(samples).scaled(1e3))


def make_row(case: Case, measured: Measurement, facts: Mapping[str, float | str], card: Card) -> Row:
    """One row of the summary.

    ``device_ms`` and ``wall_ms`` are medians with their 95 % intervals, ``host_ms`` a median. Where the device time is
    judged, the host has a lead when it is taken (conformance.bench.measure); ``waits_for_host`` says whether waiting
    for it is in the time nevertheless. ``floor_ms`` is ``floor bytes`` over the copy bandwidth, ``share_of_floor`` that
    over the device time. ``interleaved`` is the ratio of this row's time to that of the row it was interleaved with,
    paired round by round, and the medians of that one in these rounds. The peaks are bytes above what there was before
    the case was built; ``peak_reserved`` is None where the row beside it hides too much of it.
    """
    judged = HEADLINE.get(case.group, "device")
    device = [r.device for r in measured.device_rounds]
    wall = [r.wall for r in measured.rounds]
    row = empty_row(case)
    row["device_ms"], row["wall_ms"] = interval_ms(device), interval_ms(wall)
    row["host_ms"] = median(r.host for r in measured.rounds) * 1e3
    row["waits_for_host"] = measured.waits_for_host if judged == "device" else None
    row["rounds"], row["warm_up"] = len(measured.device_rounds), measured.warm_up.calls
    row["facts"] = dict(facts)
    row["peak_allocated"], row["peak_reserved"] = measured.peak_allocated, measured.peak_reserved
    floor = None
    if isinstance(moved := facts.get("floor bytes"), int | float):
        floor = moved / card.copy_bandwidth
        row["floor_ms"], row["share_of_floor"] = floor * 1e3, floor / median(device)
    if measured.beside and case.beside is not None:
        pair = [r.wall for r in measured.rounds], [r.wall for r in measured.beside]
        if judged == "device":
            pair = device, [r.device for r in (measured.beside_ahead or measured.beside)]
        ratio = paired_ratio(*pair)
        row["interleaved"] = {
            "with": case.beside,
            "ratio": ratio.median,
            "low": ratio.low,
            "high": ratio.high,
            "beside_ms": median(pair[1]) * 1e3,
            "beside_host_ms": median(r.host for r in measured.beside) * 1e3,
        }
    row["doubts"] = doubts_about(measured, floor)
    if "tokens" in facts:
        try:
            row.update({name: value for name, value in throughput(row).items() if name in row})
        except UsageError as error:
            row["doubts"].append(str(error))
    row["samples_ms"] = {
        "device": [round(seconds * 1e3, 6) for seconds in device],
        "wall": [round(seconds * 1e3, 6) for seconds in wall],
    }
    return row


def empty_row(case: Case, unavailable: str | None = None) -> Row:
    """A row without figures: what could not be measured, and why."""
    return {
        "group": case.group,
        "size": case.size,
        "name": case.name,
        "device_ms": None,
        "wall_ms": None,
        "host_ms": None,
        "waits_for_host": None,
        "rounds": 0,
        "warm_up": 0,
        "facts": {},
        "floor_ms": None,
        "share_of_floor": None,
        "tokens_per_second": None,
        "mfu": None,
        "mfu_causal": None,
        "peak_allocated": None,
        "peak_reserved": None,
        "interleaved": None,
        "doubts": [],
        "samples_ms": {"device": [], "wall": []},
        "unavailable": unavailable,
    }


def make_summary(
    environment: Mapping[str, str],
    card: Card,
    rows: Sequence[Row],
    setting: Setting,
    complete: bool,
    doubts: Sequence[str] = (),
    seconds: float | None = None,
) -> dict[str, Any]:
    """The whole run as plain data; a new field is an addition, a change is a new schema.

    Args:
        environment: versions and machine.
        card: what it can do at most.
        rows: that were measured, or could not be.
        setting: where and how large.
        complete: whether these are all rows that were asked for.
        doubts: about the card, in sentences.
        seconds: that the run took, imports and all.
    """
    return {
        "schema": SCHEMA,
        "label": SMALL if setting.small else None,
        "environment": dict(environment),
        "card": asdict(card) | {"noise": noise_of(rows), "doubts": list(doubts)},
        "quick": setting.quick,
        "complete": complete,
        "seconds": seconds,
        "rows": list(rows),
    }


def grouped(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by group and size, wherever they stand: they ran in the order of their priority."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["group"], row["size"]), []).append(row)
    return dict(sorted(found.items(), key=lambda entry: entry[0][0]))  # sizes as they came


def parameters_of(rows: Sequence[Row]) -> str:
    """How many parameters the models of some rows have, in words: ``1.34 billion parameters``. Empty if unknown."""
    numbers = [row["facts"]["parameters"] for row in rows if isinstance(row["facts"].get("parameters"), int | float)]
    if not numbers:
        return ""
    units = ((1e9, " billion", ".2f"), (1e6, " million", ".1f"), (1.0, "", ",.0f"))
    unit, word, form = next(entry for entry in units if max(numbers) >= entry[0])
    ends = dict.fromkeys(f"{number / unit:{form}}" for number in (min(numbers), max(numbers)))
    return f"{' to '.join(ends)}{word} parameters"


def read_summary(path: Path) -> dict[str, Any]:
    """A summary that an earlier run wrote.

    Raises:
        UsageError: if the file is not one.
    """
    if path.is_dir():
        path = path / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"the summary {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UsageError(f"the file {path} is not JSON: give the summary.json that an earlier bench wrote.") from error
    if not isinstance(summary, dict) or not {"schema", "environment", "card", "rows"} <= summary.keys():
        raise UsageError(f"the file {path} is no summary of the bench: give the summary.json of an earlier run.")
    if summary["schema"] != SCHEMA:
        raise UsageError(
            f"the summary {path} has schema {summary['schema']}, but this release reads {SCHEMA}: run the bench again."
        )
    return summary


def as_interval(values: Mapping[str, float]) -> Interval:
    """A row's ``{"median", "low", "high"}``."""
    return Interval(values["median"], values["low"], values["high"])
