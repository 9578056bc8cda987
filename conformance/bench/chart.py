"""What the page shows first: each optimizer's step on one scale, and its cost in a table.

The template draws with SVG whose coordinates are percentages of its box, so the same drawing fits a phone and a wide
screen, and its text is the page's own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from conformance.bench.case import AGAINST_ITSELF, OPTIMIZER_STEP, TRAINING_STEP
from conformance.bench.columns import WAITS, figure, gigabytes, parameters_of
from conformance.bench.summary import Row, Summary, grouped

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Choice:
    """One optimizer that a user may take."""

    name: str
    steps: dict[str, Row]  # its step, by the dtype of the parameters
    training: Row | None  # a training step with it, compiled, of the same model; None if there is no such row

    @property
    def first(self) -> Row:
        """The step that it is compared by: in float32, if that was measured."""
        return next(self.steps[dtype] for dtype in DTYPES if dtype in self.steps)

    @property
    def cost(self) -> float:
        """Milliseconds of a training step with it, or of its own step where there is none."""
        return (self.training or self.first).judged.median

    @property
    def state(self) -> float | None:
        """Bytes of its state per parameter, in hundredths."""
        found = self.first.number("state bytes per parameter")
        return None if found is None else round(found, 2)

    @property
    def own_step(self) -> str:
        """What its own step takes, and from an idle GPU, if that is far more."""
        own, wall = self.first.judged.median, self.first.wall_ms
        if wall is None or wall.median < 2 * own:
            return f"{figure(own)} ms"
        return f"{figure(own)} ms of the GPU, {figure(wall.median)} ms from an idle one"


@dataclass(frozen=True)
class Scale:
    """A logarithmic scale of milliseconds."""

    low: float
    high: float

    def place(self, value: float) -> float:
        """Return where a value stands, in percent."""
        return round(100 * math.log10(value / self.low) / math.log10(self.high / self.low), 2)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Places and names of the powers of ten on it."""
        exponents = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
        return [(self.place(10.0**exponent), f"{10.0**exponent:,g} ms") for exponent in exponents]


def choices(summary: Summary) -> list[Choice]:
    """Return the optimizers of the first size that was measured, the fastest first; empty if there are none."""
    parts = grouped(row for row in summary.measured if row.group == OPTIMIZER_STEP)
    (_, size), rows = next(iter(parts.items()), (("", ""), []))
    steps: dict[str, dict[str, Row]] = {}
    for row in rows:
        dtype = row.text("parameter dtype")
        if dtype in DTYPES and not row.name.endswith(AGAINST_ITSELF):
            steps.setdefault(row.name.rpartition(", ")[0], {})[dtype] = row
    trained = [row for row in summary.measured if (row.group, row.size) == (TRAINING_STEP, size)]
    found = [Choice(name, of, training_with(name, trained)) for name, of in steps.items()]
    return sorted(found, key=lambda choice: choice.first.judged.median)


def training_with(name: str, rows: Sequence[Row]) -> Row | None:
    """Return the reference's plain compiled row with an optimizer, whose 8-bit ones are those of bitsandbytes."""
    for row in rows:
        stack, *settings = row.name.split(", ")
        if stack == "reference" and settings[1:] == [name.removeprefix("bitsandbytes "), "compiled"]:
            return row
    return None


def scale_of(found: Sequence[Choice]) -> Scale:
    """Return a scale on which all their times have a place, its ends 1, 2 or 5 times a power of ten."""
    rows = [row for choice in found for row in choice.steps.values()]
    values = [time.median for row in rows for time in (row.device_ms, row.wall_ms) if time is not None]
    values += [row.floor_ms for row in rows if row.floor_ms is not None]
    ends = [step * 10.0**exponent for exponent in range(-9, 9) for step in (1, 2, 5)]
    low = max(end for end in ends if end <= min(values))
    return Scale(low, min(end for end in ends if end >= max(values) and end > low))


def answers(found: Sequence[Choice]) -> list[tuple[str, str]]:
    """Say which optimizer is the fastest and which keeps the least, by whole training steps where there are any.

    Returns:
        A heading and a sentence for each answer.
    """
    trained = [choice for choice in found if choice.training is not None]
    if not found:
        return []
    best = min(trained or found, key=lambda choice: choice.cost)
    of = f"{parameters_of([best.first]) or 'all parameters'} in {best.first.text('parameter dtype')}"
    said = f"Its step over {of} takes {best.own_step}"
    if best.training is not None:
        said += f", and a whole training step {figure(best.training.judged.median)} ms"
    answer = [(f"Fastest{' in training' if trained else ''}: {best.name}.", f"{said}.")]
    states = [(choice.state, choice.cost, choice) for choice in trained or found if choice.state is not None]
    state, _, least = min(states, key=lambda entry: entry[:2], default=(None, 0.0, best))
    if state is not None and best.state is not None and state < best.state:
        said = f"It keeps {state:.2f} bytes of state per parameter instead of {best.state:.2f}. "
        said += f"Its step takes {least.own_step}"
        if least.training is not None and (beside := least.training.interleaved) is not None:
            said += f", and a whole training step {beside.ratio:.2f} times as long as with {best.name}"
        answer.append((f"Least memory: {least.name}.", f"{said}."))
    return answer


def cost_table(found: Sequence[Choice]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return heads and lines of the table beside the chart; a column that would be empty is left out."""

    def step(row: Row | None) -> str:
        return "" if row is None else figure(row.judged.median) + (f" {WAITS}" if row.waits_for_host else "")

    def trained(row: Row | None) -> str:
        if row is None or row.interleaved is None:
            return "" if row is None else f"{figure(row.judged.median)} ms"
        return f"{row.interleaved.ratio:.3f} x"

    columns = {
        "float32, ms": [step(choice.steps.get("float32")) for choice in found],
        "bfloat16, ms": [step(choice.steps.get("bfloat16")) for choice in found],
        "state, bytes each": ["" if choice.state is None else f"{choice.state:.2f}" for choice in found],
        "training step": [trained(choice.training) for choice in found],
        "its peak, GB": [gigabytes(choice.training.peak_allocated) if choice.training else "" for choice in found],
    }
    columns = {head: cells for head, cells in columns.items() if any(cells)}
    lines = [(choice.name, [cells[place] for cells in columns.values()]) for place, choice in enumerate(found)]
    return list(columns), lines
