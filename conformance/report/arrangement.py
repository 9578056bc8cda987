"""What the index shows first: one column for each stack, by kind, and the findings that matter most."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from conformance.causes import explained_by
from conformance.clause import Clause
from conformance.report.result import Report

KINDS = {
    "Trainers": (
        *("reference", "litgpt", "litgpt-lora", "lightning-trainer"),
        *("transformers", "transformers-peft", "trl", "deepspeed", "torchtitan"),
    ),
    "Models": ("x-transformers",),
    "Loops": ("accelerate", "nanogpt", "nanochat", "examples.plain_loop_adapter:PlainLoop"),
}
"""Subjects by what they are: a library's trainer, a library's model in a loop of ours, or somebody's own loop."""
VARIANTS = {"tests.captured:Captured": "reference"}
"""Subjects that are another way to run a stack, not a stack of their own."""
MOST = 6
"""Findings at the head of the page."""


class Shown(Protocol):
    """A column of the matrix."""

    @property
    def report(self) -> Report:
        """Its results."""


C = TypeVar("C", bound=Shown)


@dataclass(frozen=True)
class Worst:
    """A clause that stacks break."""

    clause: Clause
    columns: Sequence["Shown"]
    """Of the stacks that break it."""


def arranged(columns: Sequence[C]) -> tuple[dict[str, list[C]], list[C]]:
    """Return one column of each stack, by kind, and the others: earlier releases and other machines.

    Of a stack, the newest release comes first, and of that the result on a CPU.
    """
    stacks: dict[str, list[C]] = {}
    for column in columns:
        spec = column.report.spec
        stacks.setdefault(VARIANTS.get(spec, f"{spec} {column.report.name}"), []).append(column)
    for variant in set(VARIANTS.values()):  # beside the stack, if it is there
        own = next((key for key in stacks if key.partition(" ")[0] == variant and key != variant), None)
        if own is not None and variant in stacks:
            stacks[own] += stacks.pop(variant)
    kinds: dict[str, list[C]] = {kind: [] for kind in (*KINDS, "Others")}
    rest: list[C] = []
    for found in stacks.values():
        first, *others = sorted(found, key=rank, reverse=True)
        kind = next((kind for kind, specs in KINDS.items() if first.report.spec in specs), "Others")
        kinds[kind].append(first)
        rest += others
    for kind, specs in KINDS.items():
        kinds[kind].sort(key=lambda column: specs.index(column.report.spec))
    return {kind: found for kind, found in kinds.items() if found}, rest


def rank(column: Shown) -> tuple[bool, list[int], bool]:
    """Return what puts a column before others of its stack: that of the stack itself, the release, the CPU."""
    report = column.report
    numbers = [int(number) for number in re.findall(r"\d+", report.version.partition(",")[0])]
    return report.spec not in VARIANTS, numbers, report.environment.get("gpu", "none") == "none"


def worst(columns: Iterable[Shown], clauses: Iterable[Clause]) -> list[Worst]:
    """Return the clauses that most stacks break: those of the core that every stack must keep come first.

    A failure that another failure of the same stack explains is left out.
    """
    causes: list[tuple[Shown, list[str]]] = []
    for column in columns:
        failed = [name for name, verdict in column.report.verdicts.items() if verdict.outcome == "fail"]
        causes.append((column, [name for name in failed if not explained_by(name, failed)]))
    found = [Worst(clause, [column for column, names in causes if clause.id in names]) for clause in clauses]
    found = [each for each in found if each.columns]
    order = sorted(  # what hangs on one package of an optimizer is no matter for most readers
        found,
        key=lambda w: (w.clause.level != "must", w.clause.part != "core", bool(w.clause.packages), -len(w.columns)),
    )  # stable: of equals the first in the catalogue
    return order[:MOST]
