"""From results to a letter on the terminal and a JSON file for machines."""

import importlib.metadata
import json
import os
import platform
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conformance.clause import CHAPTERS
from conformance.session import OUTCOMES, Outcome, Result
from conformance.subject import Subject, UsageError

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1
PACKAGES = ("gpt-conformance", "torch", "lightning", "bitsandbytes", "grokadamw")
COLORS: dict[Outcome, str] = {
    "pass": "green",
    "fail": "bold red",
    "deviates": "yellow",
    "fixed": "bold red",
    "n/a": "dim",
    "error": "bold magenta",
}


def environment() -> dict[str, str]:
    """What the results were obtained with: versions and machine."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = checkout_version() if name == PACKAGES[0] else "not installed"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "gpu": gpu,
        **versions,
    }


def checkout_version() -> str:
    """This package's version where it runs from a checkout that was not installed."""
    try:
        text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
        return f"{tomllib.loads(text)['project']['version']}, from a checkout"
    except (OSError, tomllib.TOMLDecodeError, KeyError):
        return "not installed"


def processor() -> str:
    """The processor's name, as precisely as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def count(results: Iterable[Result]) -> dict[str, int]:
    """How many results have each outcome; all six are named."""
    counted = Counter(result.outcome for result in results)
    return {outcome: counted[outcome] for outcome in OUTCOMES}


def as_json(subject: Subject, spec: str, results: Sequence[Result], partial: bool) -> dict[str, Any]:
    """The report as plain data. The form is kept stable: a new field is an addition, a change a new schema."""
    return {
        "schema": SCHEMA,
        "subject": {"name": subject.name, "version": subject.version},
        "environment": environment() | {"judged as": spec},
        "partial": partial,
        "summary": count(results),
        "clauses": [
            {
                "id": result.clause.id,
                "level": result.clause.level,
                "requirement": result.clause.requirement,
                "outcome": result.outcome,
                "expected": result.expected,
                "seen": result.seen,
                "reason": result.reason,
                "seconds": round(result.seconds, 3),
            }
            for result in results
        ],
    }


def check_writable(path: Path) -> None:
    """Raise UsageError before the run if its report could not be written afterwards."""
    if path.is_dir():
        raise UsageError(f"the report {path} is a folder: give the path of a file.")
    if not path.parent.is_dir():
        raise UsageError(f"the report {path} cannot be written: there is no folder {path.parent}.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"the report {path} cannot be written: permission denied.")


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write a report, whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def repeat_command(subject_spec: str, result: Result) -> str:
    """The command that judges just this clause."""
    return f"python -m pytest --pyargs conformance.suites --subject {subject_spec} --clause {result.clause.id}"


def print_letter(
    console: "Console", subject: Subject, spec: str, results: Sequence[Result], partial: bool, verbose: bool
) -> None:
    """The result as a doctor's letter: what was checked, what is wrong, why it matters, how to mend it."""
    from rich.markup import escape
    from rich.table import Table

    facts = environment()
    console.print()
    console.print(f"[bold]{escape(subject.name)} {escape(subject.version)}[/], judged by {len(results)} clauses")
    console.print(
        f"[dim]gpt-conformance {facts['gpt-conformance']}, Python {facts['python']}, torch {facts['torch']}, "
        f"{escape(facts['processor'])}, {facts['cores']} cores, GPU: {escape(facts['gpu'])}[/]",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("chapter", no_wrap=True)
    for outcome in OUTCOMES:
        table.add_column(outcome, justify="right")
    for chapter, title in CHAPTERS.items():
        row = count(result for result in results if result.clause.chapter == chapter)
        if sum(row.values()):
            cells = [f"[{COLORS[o]}]{row[o]}[/]" if row[o] else "[dim]·[/]" for o in OUTCOMES]
            table.add_row(f"{chapter:6}  {title}", *cells)
    console.print(table)

    for result in results:
        if result.outcome in ("fail", "fixed", "error", "deviates"):
            print_finding(console, spec, result, verbose)
    reasons: dict[str, list[str]] = {}
    for result in results:
        if result.outcome == "n/a":
            reasons.setdefault(result.reason, []).append(result.clause.id)
    if reasons:
        console.print("\n[bold]Not applicable[/]")
        for reason, ids in reasons.items():
            console.print(f"  {', '.join(ids)}: {escape(reason)}", style="dim")
    total = ", ".join(f"[{COLORS[o]}]{n} {o}[/]" for o, n in zip(OUTCOMES, count(results).values(), strict=True) if n)
    console.print(f"\n[bold]Result:[/] {total}, {sum(result.seconds for result in results):.1f} s")
    if partial:
        console.print(
            "[yellow]Partial: not all clauses were judged, so this says nothing about the stack as a whole.[/]"
        )


def print_finding(console: "Console", spec: str, result: Result, verbose: bool) -> None:
    """One clause that did not pass."""
    from rich.markup import escape
    from rich.padding import Padding
    from rich.text import Text

    clause, color = result.clause, COLORS[result.outcome]
    console.print(f"\n[{color}]{result.outcome.upper()} {clause.id}[/]  [bold]{escape(clause.requirement)}[/]")
    lines = [
        ("Expected", result.expected),
        ("Seen", result.seen),
        ("Reason", result.reason),
        ("Why it matters", clause.why if result.outcome != "error" else ""),
        ("How to mend it", clause.mend if result.outcome == "fail" else ""),
        ("Seen before", clause.source if result.outcome == "fail" else ""),
    ]
    for label, text in lines:
        if text:
            line = Text(f"{label}: ", style="dim").append(text, style="default")
            console.print(Padding(line, (0, 0, 0, 2)))
    # In one piece, to be copied.
    console.print(f"  [dim]Repeat:[/] {escape(repeat_command(spec, result))}", soft_wrap=True)
    if verbose and result.traceback:
        console.print(Text(result.traceback, style="dim"))
