"""Metrics that a run gave to a logger instead of printing them, as lines like those that other runs print.

CSV files are read from the run's directory (Lightning's CSVLogger and many scripts write them), and TensorBoard's
event files if ``tensorboard`` is installed. Calls of common loggers are seen, too (conformance.recording.loggers). What
another one got, an adapter may hand over by ``recipe.report({"loss": 2.1}, step=3)``.
"""

import csv
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

STEPS = ("step", "global_step", "iter", "iteration", "update")
"""Names of the column that counts."""


def lines(directory: Path | None) -> Iterator[str]:
    """Yield a line for each row of metrics in the files of a run's directory."""
    if directory is None or not directory.is_dir():
        return
    for path in sorted(directory.rglob("*.csv")):
        yield from from_csv(path)
    yield from from_events(directory)


def line(metrics: Mapping[str, object], step: object = "") -> str:
    """Return metrics as one line: ``step 3: train loss 2.1, lr 0.001``."""
    told = []
    for name, value in metrics.items():
        try:
            number = float(str(value))
        except ValueError:
            continue
        if math.isfinite(number):
            # With a point, as printed metrics have it, and as many digits as the file has.
            text = str(value) if any(sign in str(value) for sign in ".eE") else f"{number:.1f}"
            told.append(f"{name.replace('/', ' ').replace('.', ' ')} {text}")
    return f"step {step}: {', '.join(told)}" if told else ""


def from_csv(path: Path) -> Iterator[str]:
    """Yield a line for each row of a CSV file with a head; none if it is another kind of file."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error):
        return
    for row in rows:
        cells = {str(name): value for name, value in row.items() if isinstance(value, str) and value.strip()}
        step = next((cells.pop(name) for name in STEPS if name in cells), "")
        if text := line(cells, step):
            yield text


def from_events(directory: Path) -> Iterator[str]:
    """Yield a line for each scalar in TensorBoard's event files."""
    folders = {path.parent for path in directory.rglob("*tfevents*")}
    if not folders:
        return
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        return
    for folder in sorted(folders):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                yield line({tag: f"{event.value:.7g}" if event.value % 1 else event.value}, event.step)
