"""Judge the blind faults by all clauses until one fails, and keep what the first judgement said.

``python -m tests.mutants.blind --write reports/blind-mutants.json``. A file that is there keeps what each fault got at
first sight; only what it gets now is written anew. ``--only WORD`` judges the faults that have a word in their name.
``--matrix reports/kill-matrix.json`` judges nothing, but takes over what the kill matrix says of mutants with the same
edits: those that mark what was mended. ``--round 2``, ``3`` or ``4`` takes the faults of that round in place of the
first.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import re
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from conformance.causes import in_order_of_cause
from conformance.clause import catalogue
from conformance.report.environment import environment
from conformance.subjects.reference import Reference
from tests.mutants import MUTANTS
from tests.mutants.blind import FAULTS as FIRST
from tests.mutants.blind import causes, fourth, second, third
from tests.mutants.blind.fourth import causes as fourth_causes
from tests.mutants.blind.second import causes as second_causes
from tests.mutants.blind.third import causes as third_causes
from tests.mutants.kill_matrix import diff, outcomes, until_one_fails
from tests.mutants.planting import Mutant, planted

ROUNDS = {1: FIRST, 2: second.FAULTS, 3: third.FAULTS, 4: fourth.FAULTS}
CAUSES = {
    "blind": causes.CAUSES,
    "blind2": second_causes.CAUSES,
    "blind3": third_causes.CAUSES,
    "blind4": fourth_causes.CAUSES,
}


def names_cause(fault: Mutant, letter: str) -> bool:
    """Return whether a letter has a word by which it names the cause of a fault."""
    prefix, _, name = fault.name.partition("-")
    return re.search(CAUSES[prefix][name], letter, re.IGNORECASE) is not None


def judged(fault: Mutant) -> dict[str, Any]:
    """Return what the clauses make of one fault, up to the first that fails and those that explain it."""
    with planted(fault.edits):
        found = until_one_fails(Reference(), ())
    failed = in_order_of_cause([identity for identity, result in found.items() if result.outcome == "fail"])
    errors = [f"{identity}: {result.reason}" for identity, result in found.items() if result.outcome == "error"]
    if not failed:
        return {"clause": None, "errors": errors}
    first = found[failed[0]]
    named = names_cause(fault, f"{first.clause.requirement} {first.expected} {first.seen}")
    told = {"clause": failed[0], "failed": failed, "expected": first.expected, "seen": first.seen}
    return {**told, "names the cause": named, "errors": errors}


def of_matrix(matrix: dict[str, Any], faults: list[Mutant]) -> dict[str, dict[str, Any]]:
    """Return what a kill matrix says of the faults that stand in it as mutants, by the name of the fault."""
    rows = {row["mutant"]: row for row in matrix["mutants"]}
    names = {mutant.edits: mutant.name for mutant in MUTANTS}
    found = {}
    for fault in faults:
        row = rows.get(names.get(fault.edits, ""))
        if row is not None and row["first"] is not None:
            letter = " ".join((catalogue()[row["first"]["clause"]].requirement, *map(str, row["first"].values())))
            told = {**row["first"], "failed": row["killed_by"]}
            found[fault.name] = {**told, "names the cause": names_cause(fault, letter), "errors": row["errors"]}
    return found


def judge(faults: list[Mutant], console: Console) -> list[dict[str, Any]]:
    """Return what the clauses make of these faults, judged on all cores."""
    torch.set_num_threads(1)  # as in kill_matrix: OpenMP's threads do not survive the fork
    outcomes(Reference())
    context = multiprocessing.get_context("fork")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with ProcessPoolExecutor(os.cpu_count(), context) as pool:
            return list(track(pool.map(judged, faults), "Faults", total=len(faults), console=console))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants.blind", description=__doc__)
    parser.add_argument("--round", type=int, choices=ROUNDS, default=1, help="of the faults (1)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="keep the judgements as JSON")
    parser.add_argument("--only", nargs="+", default=(), metavar="WORD", help="judge what has it in its name")
    parser.add_argument("--matrix", type=Path, metavar="FILE", help="judge nothing: take over what a kill matrix says")
    arguments = parser.parse_args()
    console, path = Console(), arguments.write
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {}
    everything = [(chapter, fault) for chapter, faults in ROUNDS[arguments.round].items() for fault in faults]
    names = {fault.name for _, fault in everything}
    if others := [row["fault"] for row in before.get("faults", ()) if row["fault"] not in names]:
        parser.error(f"{path} holds {others[0]}, which is not of round {arguments.round}: name another file or round.")
    chosen = [
        fault for _, fault in everything if not arguments.only or any(word in fault.name for word in arguments.only)
    ]
    if arguments.matrix:
        now = of_matrix(json.loads(arguments.matrix.read_text(encoding="utf-8")), [fault for _, fault in everything])
    else:
        now = dict(zip([fault.name for fault in chosen], judge(chosen, console), strict=True))
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    told = {"date": date, "clauses": len(catalogue()), "environment": environment()}
    rows = []
    for chapter, fault in everything:
        row = next((row for row in before.get("faults", ()) if row["fault"] == fault.name), None)
        if fault.name in now:
            row = {
                "fault": fault.name,
                "chapter": chapter,
                "published": fault.published,
                "diff": diff(fault),
                "first sight": row["first sight"] if row else now[fault.name],
                "now": now[fault.name],
            }
            seen = now[fault.name]
            console.print(
                f"{fault.name}: {seen['clause'] or '[red]survives[/]'} {seen.get('seen', '')}", *seen["errors"]
            )
        rows += [row] if row else []
    if path:
        result = {"schema": 1, "first sight": before.get("first sight", told), "now": told, "faults": rows}
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for sight in ("first sight", "now"):
        killed = sum(row[sight]["clause"] is not None for row in rows)
        console.print(f"{sight}: {killed} of {len(rows)} faults are killed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
