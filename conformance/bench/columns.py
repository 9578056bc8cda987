"""The columns of a table of rows, for the terminal, the page and the documentation: each is written down once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from conformance.bench.bootstrap import Interval
from conformance.bench.case import FINE_TUNING_STEP, OPTIMIZER_STEP, TRAINING_STEP
from conformance.bench.summary import Row

# What the letters of a floor's arithmetic stand for; the numbers behind them are bytes.
LETTERS = (
    "In these sums, p is the parameter, g its gradient, m and v are the moments, a is the scales of 8-bit moments, and "
    "e is GrokAdamW's average of gradients."
)
WAITS = "*"
WAITS_MEANS = f"{WAITS} The GPU waits for the host during the step, so the host's time is in it."


@dataclass(frozen=True)
class Column:
    """One column."""

    head: str
    cell: Callable[[Row], str]  # the text of a row that was measured; empty where it has no such figure
    about: str  # what the column says, as a sentence


def figure(value: float | None) -> str:
    """Return a number with four significant digits, thousands with all; empty for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def milliseconds(times: Interval | None) -> str:
    """Return the median, and the larger half of its interval in percent: ``1.338 ±0.2%``."""
    if times is None:
        return ""
    spread = max(times.high - times.median, times.median - times.low) / times.median
    return f"{figure(times.median)} ±{spread:.1%}"


def percent(value: float | None) -> str:
    """Return a share in percent; empty for None."""
    return "" if value is None else f"{value:.1%}"


def gigabytes(value: int | None) -> str:
    """Return bytes in units of 1e9; empty where there are none, as on a CPU."""
    return figure(value / 1e9) if value else ""


def device(row: Row) -> str:
    """Return the time on the device, with the mark of rows that wait for the host."""
    return milliseconds(row.device_ms) + (f" {WAITS}" if row.waits_for_host else "")


def ratio(row: Row) -> str:
    """Return the ratio to the row that it was interleaved with."""
    found = row.interleaved
    return f"{found.ratio:.3f} ({found.low:.3f}-{found.high:.3f})" if found else ""


COLUMNS = {
    "device": Column("device ms", device, "Time on the device: the median, and its 95 % bootstrap interval."),
    "wall": Column("wall ms", lambda r: milliseconds(r.wall_ms), "Time from an idle GPU to an idle GPU."),
    "host": Column("host ms", lambda r: figure(r.host_ms), "Time until the call returns; the GPU may still be busy."),
    "floor": Column("floor ms", lambda r: figure(r.floor_ms), "The bytes that must move, over the copy bandwidth."),
    "traffic": Column(
        "floor B/param", lambda r: figure(r.number("floor bytes per parameter")), "Bytes that must move per parameter."
    ),
    "share": Column("of floor", lambda r: percent(r.share_of_floor), "The floor over the time on the device."),
    "state": Column(
        "state B/param",
        lambda r: figure(r.number("state bytes per parameter")),
        "Bytes of optimizer state per parameter.",
    ),
    "trained": Column(
        "trained M",
        lambda r: figure(None if (found := r.number("trained parameters")) is None else found / 1e6),
        "Weights that are trained, in millions.",
    ),
    "states": Column(
        "state MB",
        lambda r: figure(None if (found := r.number("state bytes")) is None else found / 1e6),
        "Optimizer state, 1e6 bytes.",
    ),
    "tokens": Column("tokens/s", lambda r: figure(r.tokens_per_second), "Tokens per second, by the wall time."),
    "mfu": Column("MFU", lambda r: percent(r.mfu), "FLOPs per second over the card's dense bfloat16 peak."),
    "causal": Column("MFU causal", lambda r: percent(r.mfu_causal), "The same with half of the attention counted."),
    "peak": Column("peak GB", lambda r: gigabytes(r.peak_allocated), "Peak of the memory in tensors, 1e9 bytes."),
    "reserved": Column(
        "reserved GB",
        lambda r: gigabytes(r.peak_reserved),
        "Peak of the memory that the allocator held; empty where the row beside it hides too much of it.",
    ),
    "ratio": Column("ratio", ratio, "Time over that of the row it was interleaved with, paired round by round."),
    "rounds": Column("rounds", lambda r: str(r.rounds), "Rounds that were timed."),
}

# What the documentation shows of each group; of a group that is not here, all columns.
CHOICE = {
    OPTIMIZER_STEP: ("device", "share", "wall", "state", "peak", "ratio"),
    TRAINING_STEP: ("wall", "tokens", "mfu", "causal", "peak", "ratio"),
    FINE_TUNING_STEP: ("wall", "tokens", "trained", "states", "peak", "ratio"),
}


def columns_of(rows: Sequence[Row], keys: Sequence[str] = tuple(COLUMNS)) -> list[Column]:
    """Return the columns in which one of some measured rows has something to say."""
    return [COLUMNS[key] for key in keys if any(COLUMNS[key].cell(row) for row in rows)]


def parameters_of(rows: Sequence[Row]) -> str:
    """Say how many parameters the models of some rows have: ``1.34 billion parameters``. Empty if unknown."""
    numbers = [number for row in rows if (number := row.number("parameters")) is not None]
    if not numbers:
        return ""
    units = ((1e9, " billion", ".2f"), (1e6, " million", ".1f"), (1.0, "", ",.0f"))
    unit, word, form = next(entry for entry in units if max(numbers) >= entry[0])
    ends = dict.fromkeys(f"{number / unit:{form}}" for number in (min(numbers), max(numbers)))
    return f"{' to '.join(ends)}{word} parameters"


def notes_of(rows: Sequence[Row]) -> list[str]:
    """Return what the cells of some rows of one group and size cannot hold, in sentences or lines."""
    measured = [row for row in rows if row.measured]
    found = [WAITS_MEANS] if any(row.waits_for_host for row in measured) else []
    floors = {row.text("floor arithmetic"): figure(row.number("floor bytes per parameter")) for row in measured}
    found += [f"Floor of {moved} bytes per parameter: {text}." for text, moved in floors.items() if text]
    if any(floors):
        found.append(LETTERS)
    if formula := next((row.text("formula") for row in measured if row.mfu is not None), ""):
        found.append(f"MFU: {formula}.")
    if beside := sorted({row.interleaved.with_ for row in measured if row.interleaved}):
        found.append(f"Ratio: the time over that of {'; '.join(beside)}, interleaved with it round by round.")
    found += [f"{row.name} was not measured: {row.unavailable}" for row in rows if row.unavailable is not None]
    for fact, prefix in (("decays", "weight decay of "), ("note", "")):
        told: dict[str, list[str]] = {}
        for row in measured:
            told.setdefault(row.text(fact), []).append(row.name)
        for text, names in sorted(told.items(), key=lambda entry: len(entry[1])):
            others = "all other rows" if fact == "decays" and len(names) > len(measured) / 2 else "; ".join(names)
            found += [f"{'all rows' if len(told) == 1 else others}: {prefix}{text}."] if text else []
    return found


def describe_drifts(drifts: Mapping[tuple[str, str], float]) -> str:
    """Return ``1.5% (optimizer step, gpt2-124m), 0.4% (training step, gpt2-124m)``; empty if there are none."""
    return ", ".join(f"{drift:.1%} ({group}, {size})" for (group, size), drift in drifts.items())
