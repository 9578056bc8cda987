"""The command ``python -m conformance diff``: two records, and where the runs first differ."""

import json
import math
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from conformance.auditing.diff import PHASES, Comparison, Difference, compare
from conformance.auditing.merged import WholeRun, whole_run
from conformance.auditing.traces import load
from conformance.errors import UsageError, describe_error, quoted
from conformance.options import FAILED, PASSED
from conformance.report.result import plain
from conformance.report.wrapping import print_wrapped

SCHEMA = 1


def compare_records(first: Path, second: Path, noise: Path | None, form: str) -> int:
    """Compare two records, print where the runs first differ, and return the exit code.

    Raises:
        UsageError: for a record that is missing, damaged, or without an update.
    """
    try:
        runs = [read(folder) for folder in (first, second)]
        repeat = compare(runs[0], read(noise)) if noise is not None else None
        found = compare(runs[0], runs[1], repeat)
    # A record is read without running code from it, but its values may be of any type: somebody may have forged it.
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
        raise UsageError(
            f"the records cannot be compared ({describe_error(error)[:120]}): one of them is damaged or of another "
            "release; record the runs again."
        ) from error
    if form == "json":
        print(json.dumps(as_json(found), indent=2))
    else:
        console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 100, highlight=False)
        print_comparison(console, found, str(first), str(second), repeated=repeat is not None)
    return FAILED if found.parting else PASSED


def read(folder: Path) -> WholeRun:
    """Return the run of a record."""
    run = whole_run(load(folder))
    if not run.updates:
        raise UsageError(f"the record in {folder} has no update: audit a run that makes at least one.")
    return run


def as_json(found: Comparison) -> dict[str, Any]:
    """Return a comparison as plain data."""
    return {
        "schema": SCHEMA,
        "kind": "diff",
        "parted": found.parting is not None,
        "cause": found.cause,
        "updates": found.updates,
        "notes": found.notes,
        "not_compared": found.unseen,
        "seen": [
            {
                "update": number,
                "phase": entry.phase,
                "difference": entry.value if math.isfinite(entry.value) else None,
                "bound": entry.bound,
                "parts": entry.parts,
                "tensors": list(entry.tensors),
                "words": entry.words,
            }
            for number, entry in found.seen
        ],
    }


def print_comparison(console: Console, found: Comparison, first: str, second: str, repeated: bool) -> None:
    """Print a comparison: the first difference, then every phase that was compared."""
    console.print()
    parting = found.parting
    names = f"{plain(first)} and {plain(second)}"
    if parting is None:
        words = f" are equal within noise over {found.updates} update{'s' * (found.updates != 1)}."
        print_wrapped(console, Text(names, style="bold").append(words, style="not bold"))
    else:
        number, entry = parting
        where = "at the start" if entry.phase == "start" else f"in update {number}, in the {entry.phase}"
        what = "the processes of one run differ from each other" if entry.cause else "first differ"
        print_wrapped(console, Text(f"{names}{':' if entry.cause else ''} {what} {where}", style="bold red"))
        told = {"Looks like": found.cause, "Seen": entry.words, "Largest difference": amount(entry)}
        told["Tensors"] = f"{quoted(entry.tensors)}" if entry.tensors else ""
        for label, text in told.items():
            if text:
                line = Text(f"{label}: ", style="dim").append(plain(text), style="default not dim")
                print_wrapped(console, line, indent=2)
    for note in [*found.notes, *(f"Not compared: {words}" for words in found.unseen)]:
        print_wrapped(console, Text(plain(note), style="dim"), indent=2)
    noise = "twice what the repeat shows, or the bound of the dtype if that is more" if repeated else "by the dtype"
    console.print()
    words = f"Largest relative difference in each phase; in brackets, what counts as noise ({noise})"
    print_wrapped(console, Text(words, style="dim"))
    console.print(table(found))


def amount(entry: Difference) -> str:
    """Return a difference in words."""
    return f"{entry.value:.2g}; noise is at most {entry.bound:.2g}" if math.isfinite(entry.value) else ""


def table(found: Comparison) -> Table:
    """Return the phases by update."""
    result = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    result.add_column("update", justify="right")
    shown = [phase for phase in PHASES if any(entry.phase == phase for _, entry in found.seen)]
    for phase in shown:
        result.add_column(phase, justify="right")
    for number in dict.fromkeys(number for number, _ in found.seen):
        cells = {entry.phase: entry for update, entry in found.seen if update == number}
        row = [Text("start" if number == 0 else str(number))]
        for phase in shown:
            cell = cells.get(phase)
            row.append(Text("·", "dim") if cell is None else Text(short(cell), "bold red" if cell.parts else ""))
        result.add_row(*row)
    return result


def short(entry: Difference) -> str:
    """Return a difference and its bound for a cell."""
    value = f"{entry.value:.1e}" if math.isfinite(entry.value) and entry.value else "0" if not entry.value else "∞"
    return f"{value} ({entry.bound:.0e})" if entry.bound else value
