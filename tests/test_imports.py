"""Imports run downwards: no circle, no arrow to a higher floor, and the judge does not import the judged."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each package from the ground up. A module belongs to the longest of these names that it begins with. It may import
# from its own room and from lower floors; rooms on one floor do not import each other.
FLOORS = {
    "conformance": [
        ["conformance.causes", "conformance.errors", "conformance.interrupts", "conformance.version"],
        [
            "conformance.capabilities",
            "conformance.chats",
            "conformance.choice",
            "conformance.tokens",
            "conformance.recording.trace",
            "conformance.options",
            "conformance.reading",
        ],
        ["conformance.recipe", *(f"conformance.recording.{n}" for n in ("snapshot", "isolation", "limits", "files"))],
        ["conformance.subject", *(f"conformance.recording.{n}" for n in ("gates", "metrics", "weights", "dropping"))],
        [f"conformance.recording.{n}" for n in ("unseen", "loggers", "masters", "opened")],
        ["conformance.recording.calls", "conformance.recording.inner"],
        ["conformance.recording.recorder"],
        ["conformance.recording"],
        ["conformance.probes", "conformance.scripts"],
        ["conformance.loading"],
        ["conformance.blame", "conformance.recording.ranks", "conformance.unread"],
        ["conformance.runs"],
        ["conformance.clause", "conformance.checks", "conformance.deviations", "conformance.causes"],
        ["conformance.suites", "conformance.session", "conformance.catalogue"],
        ["conformance.report"],
        ["conformance.supervision", "conformance.progress"],
        ["conformance.engine"],
        ["conformance.auditing"],
        ["conformance.skeleton"],
        ["conformance.cli"],
        ["conformance.plugin", "conformance.__main__"],
        ["conformance"],
        ["conformance.subjects", "conformance.bench"],
    ],
    "reference": [
        ["reference.errors", "reference.heartbeat", "reference.interrupts"],
        ["reference.config", "reference.files"],
        ["reference.model", "reference.optimizers", "reference.data"],
        ["reference.finetuning"],
        ["reference.checkpoint", "reference.embedding", "reference.prepare"],
        ["reference.training", "reference.interchange"],
        ["reference.cli"],
        ["reference.__main__", "reference"],
    ],
}


def modules(package: str) -> dict[str, Path]:
    """Files of a package, by module name."""
    found = {}
    for path in (ROOT / package).rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


FILES = modules("conformance") | modules("reference")


def imported(name: str) -> set[str]:
    """Our modules that a module imports, wherever in its text."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports by a relative name"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {path if path in FILES else str(node.module) for path in inside}
    return {module for module in found if module in FILES} - {name}


ARROWS = {name: imported(name) for name in FILES}


def floor(name: str) -> tuple[int, str]:
    """Number and name of the floor that a module is on."""
    package = name.partition(".")[0]
    entries = [(number, entry) for number, names in enumerate(FLOORS[package]) for entry in names]
    # The package's own __init__ is a room by itself, not the home of every module that has none.
    homes = [(n, entry) for n, entry in entries if name == entry or (name.startswith(f"{entry}.") and entry != package)]
    assert homes, f"{name} is on no floor: add it to FLOORS"
    return max(homes, key=lambda home: len(home[1]))


def test_no_circle() -> None:
    try:
        list(graphlib.TopologicalSorter(ARROWS).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_the_judge_stands_alone() -> None:
    judge = {n: a for n, a in ARROWS.items() if n.startswith("conformance")}
    allowed = ("conformance.subjects.", "conformance.bench.")
    arrows = [(n, m) for n, found in judge.items() for m in found if m.startswith("reference")]
    assert not [arrow for arrow in arrows if not arrow[0].startswith(allowed)]
    judged = {n: a for n, a in ARROWS.items() if n.startswith("reference")}
    assert not [(n, m) for n, arrows in judged.items() for m in arrows if m.startswith("conformance")]


@pytest.mark.parametrize("package", FLOORS)
def test_no_arrow_upwards(package: str) -> None:
    wrong = []
    for name in sorted(n for n in FILES if n.partition(".")[0] == package):
        here, room = floor(name)
        for module in ARROWS[name]:
            if module.partition(".")[0] == package:
                there, other = floor(module)
                if there > here or (there == here and other != room):
                    wrong.append(f"{name} ({room}) -> {module} ({other})")
    assert not wrong


def test_an_arrow_that_is_wrong_is_seen() -> None:
    assert floor("conformance.recording.trace") < floor("conformance.recording.recorder")
    assert floor("conformance.checks.decay")[0] < floor("conformance.suites.test_decay")[0]
    assert "conformance.recipe" in ARROWS["conformance.runs"]
