"""The kill matrix: every mutant and every harmless variant against every clause.

``nox -s mutants`` prints it; ``nox -s mutants -- --write reports/kill-matrix.json`` keeps it. Exit code 1 if a mutant
survives the clauses named beside it, a clause kills nothing, or a harmless variant is killed.
"""

import argparse
import difflib
import inspect
import json
import multiprocessing
import os
import sys
import textwrap
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from conformance.clause import catalogue
from conformance.report.environment import environment
from conformance.session import Session
from conformance.subject import Subject
from conformance.subjects.reference import Reference
from tests.mutants import HARMLESS, MUTANTS, Mutant, planted, resolve


def outcomes(subject: Subject) -> dict[str, str]:
    """The outcome of every clause."""
    with Session(subject) as session:
        return {identity: session.judge(clause).outcome for identity, clause in catalogue().items()}


def diff(mutant: Mutant) -> list[str]:
    """The lines that a mutant removes and adds."""
    lines = []
    for edit in mutant.edits:
        source = textwrap.dedent(inspect.getsource(resolve(edit.function)))
        changed = source.replace(edit.old, edit.new)
        delta = difflib.unified_diff(
            source.splitlines(), changed.splitlines(), edit.function, "mutant", n=0, lineterm=""
        )
        lines += [line for line in delta if not line.startswith(("+++", "@@"))]
    return lines


def matrix(console: Console) -> dict[str, Any]:
    """Run everything, on all cores; some ten minutes on two."""
    torch.set_num_threads(1)  # OpenMP's threads do not survive the fork: the children would wait for them for ever
    outcomes(Reference())  # imports, once for all processes
    context = multiprocessing.get_context("fork")  # a planted fault lives in one process
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks; nothing of ours has threads
        with ProcessPoolExecutor(os.cpu_count(), context) as pool:
            mutants, harmless = pool.map(mutant_row, range(len(MUTANTS))), pool.map(variant_row, range(len(HARMLESS)))
            rows = list(track(mutants, "Mutants", total=len(MUTANTS), console=console))
            variants = list(track(harmless, "Harmless variants", total=len(HARMLESS), console=console))
    return {"schema": 1, "environment": environment(), "mutants": rows, "harmless": variants}


def mutant_row(index: int) -> dict[str, Any]:
    """What the clauses make of one mutant."""
    mutant = MUTANTS[index]
    deltas = diff(mutant)
    with planted(mutant.edits):
        found = outcomes(Reference())
    return {
        "mutant": mutant.name,
        "published": mutant.published,
        "named": list(mutant.killers),
        "killed_by": [identity for identity, outcome in found.items() if outcome == "fail"],
        "errors": [identity for identity, outcome in found.items() if outcome == "error"],
        "diff": deltas,
    }


def variant_row(index: int) -> dict[str, Any]:
    """What the clauses make of one harmless variant."""
    variant = HARMLESS[index]
    with planted(variant.edits):
        found = outcomes(variant.subject())
    killed = [identity for identity, outcome in found.items() if outcome not in ("pass", "n/a")]
    return {"variant": variant.name, "killed_by": killed}


def verdict(result: dict[str, Any]) -> list[str]:
    """What is wrong with the suite, if anything."""
    wrong = [
        f"{row['mutant']} survives {identity}"
        for row in result["mutants"]
        for identity in row["named"]
        if identity not in row["killed_by"]
    ]
    killing = {identity for row in result["mutants"] for identity in row["killed_by"]}
    wrong += [f"{identity} kills no mutant" for identity in catalogue() if identity not in killing]
    wrong += [f"{row['variant']} is killed by {row['killed_by']}" for row in result["harmless"] if row["killed_by"]]
    return wrong


def show(console: Console, result: dict[str, Any]) -> None:
    """The matrix as a table: the clauses named beside a mutant in bold, others that kill it plain."""
    table = Table("mutant", "killed by", "published", box=None, padding=(0, 2, 0, 0))
    for row in result["mutants"]:
        killers = [f"[bold]{k}[/]" if k in row["named"] else f"[dim]{k}[/]" for k in row["killed_by"]]
        table.add_row(row["mutant"], " ".join(killers) or "[red]nothing[/]", row["published"])
    for row in result["harmless"]:
        table.add_row(f"harmless: {row['variant']}", " ".join(row["killed_by"]) or "[green]none[/]", "")
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(prog="nox -s mutants --", description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help="keep the matrix as JSON")
    arguments = parser.parse_args()
    console = Console()
    result = matrix(console)
    show(console, result)
    if arguments.write:
        arguments.write.parent.mkdir(parents=True, exist_ok=True)
        arguments.write.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    wrong = verdict(result)
    for line in wrong:
        console.print(f"[red]{line}[/]")
    console.print(
        f"{len(result['mutants'])} mutants, {len(result['harmless'])} harmless variants, {len(catalogue())} clauses: "
        + ("[red]the suite has faults[/]" if wrong else "[green]all killed, none falsely[/]")
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
