"""The catalogue that ``list`` and ``explain`` read from the suites' source."""

import subprocess
import sys
from dataclasses import replace

import pytest

from conformance.catalogue import read_catalogue
from conformance.clause import catalogue, find_clauses
from conformance.runs import Runs

# Names the modules that a command of the judge has imported.
PROGRAM = "import sys; from conformance.cli import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"


def test_it_is_the_catalogue_that_is_judged() -> None:
    def nothing(runs: Runs) -> None: ...

    text, judged = read_catalogue(), catalogue()
    assert list(text) == list(judged)
    assert {k: replace(c, test=nothing) for k, c in text.items()} == {
        k: replace(c, test=nothing) for k, c in judged.items()
    }


def test_its_tests_run(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[object] = []
    monkeypatch.setattr("conformance.suites.test_decay.test_each_tensor_once", called.append)
    runs = object()
    read_catalogue()["DECAY-1"].test(runs)  # type: ignore[arg-type] # it only has to arrive
    assert called == [runs]


def test_a_chapter_is_found_in_it() -> None:
    assert {clause.chapter for clause in find_clauses(["tie"], read_catalogue()).values()} == {"TIE"}


@pytest.mark.parametrize("words", [["list"], ["explain", "ACC"]], ids=" ".join)
def test_commands_that_print_it_do_not_import_torch(words: list[str]) -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=True)
    imported = ended.stderr.split()
    assert "conformance.catalogue" in imported
    assert not {"torch", "numpy", "reference"} & set(imported)
