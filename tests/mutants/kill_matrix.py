"""The kill matrix: every mutant against the clauses until one fails, and every harmless variant against all.

``nox -s mutants`` prints it; ``nox -s mutants -- --write reports/kill-matrix.json`` keeps it. Exit code 1 if a mutant
survives the clauses named beside it, the first letter that it gets does not name its cause, a clause kills nothing,
or a harmless variant is killed.
"""

import argparse
import difflib
import inspect
import json
import multiprocessing
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from conformance.causes import FOLLOWS, in_order_of_cause
from conformance.clause import catalogue
from conformance.report.environment import environment
from conformance.session import Result, Session
from conformance.subject import Subject
from conformance.subjects.reference import Reference
from tests.mutants import HARMLESS, MUTANTS, Mutant, planted, resolve
from tests.mutants.causes import CAUSES


def outcomes(subject: Subject) -> dict[str, str]:
    """The outcome of every clause."""
    with Session(subject) as session:
        return {identity: session.judge(clause).outcome for identity, clause in catalogue().items()}


def until_one_fails(subject: Subject, named: tuple[str, ...]) -> dict[str, Result]:
    """What the clauses say, in their order, until one fails; then those that would explain it, and those named."""
    clauses, found = catalogue(), dict[str, Result]()
    with Session(subject) as session:
        for identity, clause in clauses.items():
            found[identity] = session.judge(clause)
            if found[identity].outcome == "fail":
                break
        waiting = [*named, *found]
        for identity in waiting:
            if identity not in found:
                found[identity] = session.judge(clauses[identity])
            if found[identity].outcome == "fail":
                waiting += [cause for cause in FOLLOWS.get(identity, ()) if cause not in waiting]
    return {identity: found[identity] for identity in clauses if identity in found}


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


def matrix(console: Console, only: Sequence[str] = ()) -> dict[str, Any]:
    """Run everything, on all cores, or the mutants and variants whose name holds one of these words."""

    def chosen(names: Sequence[str]) -> list[int]:
        return [n for n, name in enumerate(names) if not only or any(word in name for word in only)]

    one, other = chosen([mutant.name for mutant in MUTANTS]), chosen([variant.name for variant in HARMLESS])
    torch.set_num_threads(1)  # OpenMP's threads do not survive the fork: the children would wait for them for ever
    outcomes(Reference())  # imports, once for all processes
    context = multiprocessing.get_context("fork")  # a planted fault lives in one process
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks; nothing of ours has threads
        with ProcessPoolExecutor(os.cpu_count(), context) as pool:
            mutants, harmless = pool.map(mutant_row, one), pool.map(variant_row, other)
            rows = list(track(mutants, "Mutants", total=len(one), console=console))
            variants = list(track(harmless, "Harmless variants", total=len(other), console=console))
    return {"schema": 1, "environment": environment(), "mutants": rows, "harmless": variants}


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The rows of an earlier matrix, those that were run again in their place, in the order of the tables."""
    found = {}
    for part, key, names in (
        ("mutants", "mutant", [mutant.name for mutant in MUTANTS]),
        ("harmless", "variant", [variant.name for variant in HARMLESS]),
    ):
        rows = {row[key]: row for result in (old, new) for row in result[part]}
        found[part] = [rows[name] for name in names if name in rows]
    return new | found


def mutant_row(index: int) -> dict[str, Any]:
    """What the clauses make of one mutant."""
    mutant = MUTANTS[index]
    deltas = diff(mutant)
    with planted(mutant.edits):
        found = until_one_fails(Reference(), mutant.killers)
    killed_by = [identity for identity, result in found.items() if result.outcome == "fail"]
    first = found[in_order_of_cause(killed_by)[0]] if killed_by else None
    return {
        "mutant": mutant.name,
        "published": mutant.published,
        "named": list(mutant.killers),
        "killed_by": killed_by,
        "errors": [identity for identity, result in found.items() if result.outcome == "error"],
        "first": first and {"clause": first.clause.id, "expected": first.expected, "seen": first.seen},
        "diff": deltas,
    }


def variant_row(index: int) -> dict[str, Any]:
    """What the clauses make of one harmless variant."""
    variant = HARMLESS[index]
    with planted(variant.edits):
        found = outcomes(variant.subject())
    killed = [identity for identity, outcome in found.items() if outcome not in ("pass", "n/a")]
    return {"variant": variant.name, "killed_by": killed}


def verdict(result: dict[str, Any], whole: bool = True) -> list[str]:
    """What is wrong with the suite, if anything; unless it is a whole matrix, a clause may have no mutant in it."""
    wrong = [
        f"{row['mutant']} survives {identity}"
        for row in result["mutants"]
        for identity in row["named"]
        if identity not in row["killed_by"]
    ]
    wrong += [
        f"the first letter of {row['mutant']} names {told}" for row in result["mutants"] if (told := misnamed(row))
    ]
    killing = {identity for row in result["mutants"] for identity in row["killed_by"]}
    wrong += [f"{identity} kills no mutant" for identity in catalogue() if whole and identity not in killing]
    wrong += [f"{row['variant']} is killed by {row['killed_by']}" for row in result["harmless"] if row["killed_by"]]
    return wrong


def misnamed(row: dict[str, Any]) -> str:
    """What the first letter of a mutant says, if that is not its cause; empty if it is."""
    first = row["first"]
    if first is None:
        return "nothing"
    letter = f"{catalogue()[first['clause']].requirement} {first['expected']} {first['seen']}"
    named = re.search(CAUSES.get(row["mutant"], words_of(row["mutant"])), letter, re.IGNORECASE)
    return "" if named else f"{first['clause']}: {first['expected']} / {first['seen']}"


def words_of(name: str) -> str:
    """A pattern of the words in a mutant's name."""
    return "|".join(word for word in name.split("-") if len(word) > 3) or name


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
    parser.add_argument("--only", nargs="+", default=(), metavar="WORD", help="run again what has it in its name")
    arguments = parser.parse_args()
    console = Console()
    result = matrix(console, arguments.only)
    whole = not arguments.only
    if arguments.only and arguments.write and arguments.write.exists():
        whole = True
        result = merged(json.loads(arguments.write.read_text(encoding="utf-8")), result)
    show(console, result)
    if arguments.write:
        arguments.write.parent.mkdir(parents=True, exist_ok=True)
        arguments.write.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    wrong = verdict(result, whole)
    for line in wrong:
        console.print(f"[red]{line}[/]")
    console.print(
        f"{len(result['mutants'])} mutants, {len(result['harmless'])} harmless variants, {len(catalogue())} clauses: "
        + ("[red]the suite has faults[/]" if wrong else "[green]all killed, none falsely[/]")
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
