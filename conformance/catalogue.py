"""The catalogue as text: what ``list`` and ``explain`` print, read from the suites' source without running it.

Importing the suites imports torch, which takes longer than all the rest. The arguments of ``@clause`` are literals, so
their text says what they are; tests/conformance/test_catalogue.py compares the two catalogues.
"""

import ast
import functools
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

from conformance.clause import Clause, clause, in_order, requirement_of
from conformance.runs import Runs

SUITES = Path(__file__).parent / "suites"
DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(clause).parameters.items()
    if parameter.default is not inspect.Parameter.empty
}
"""Arguments of ``@clause`` that may be left out."""


def read_catalogue() -> dict[str, Clause]:
    """Return every clause of the suite by id, in the order of chapters and numbers, without importing the suites.

    The test of such a clause imports its file when it is called.
    """
    found = {one.id: one for path in sorted(SUITES.glob("test_*.py")) for one in clauses_in(path)}
    return {identity: found[identity] for identity in sorted(found, key=in_order)}


def clauses_in(path: Path) -> Iterator[Clause]:
    """Yield the clauses that a file of the suite declares."""
    for function in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(function, ast.FunctionDef):
            continue
        for call in function.decorator_list:
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "clause":
                given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
                test = functools.partial(imported_test, f"conformance.suites.{path.stem}", function.name)
                requirement = requirement_of(ast.get_docstring(function))
                yield Clause(ast.literal_eval(call.args[0]), requirement, test=test, **(DEFAULTS | given))


def imported_test(module: str, name: str, runs: Runs) -> None:
    """Import a file of the suite and run one of its tests."""
    getattr(importlib.import_module(module), name)(runs)
