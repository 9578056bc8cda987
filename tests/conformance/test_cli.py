"""python -m conformance: run, list, explain, report."""

import json
from pathlib import Path

import pytest

from conformance.clause import catalogue
from conformance.cli import main
from conformance.report.github import escaped
from tests.mutants import MUTANTS, planted

FUSED = next(mutant for mutant in MUTANTS if mutant.name == "fused-kwarg-injected")


def test_json_goes_to_stdout_and_to_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    assert main(["run", "--clause", "DECAY-1", "--format", "json", "--report", str(file)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(file.read_text(encoding="utf-8"))
    assert (printed["partial"], printed["summary"]["pass"], printed["clauses"][0]["id"]) == (True, 1, "DECAY-1")


def test_failures_are_annotations(capsys: pytest.CaptureFixture[str]) -> None:
    with planted(FUSED.edits):
        assert main(["run", "--clause", "OPT-1", "--clause", "OPT-4", "--format", "github"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "::error title=OPT-1 fail::The stack trains with AdamW, SGD and RMSprop of torch.optim.%0Aexpected: "
    )
    assert "%0Arepeat: python -m conformance run --subject reference --clause OPT-1" in lines[0]
    assert sum(line.startswith("::") for line in lines) == len(lines) - 1


def test_annotations_stay_in_one_line() -> None:
    assert escaped("100 %\r\nof it") == "100 %25%0D%0Aof it"


STUCK = """
from conformance import NotApplicable
from conformance.subjects.reference import Reference

class Stuck(Reference):
    def train(self, recipe):
        raise {error}
"""


@pytest.mark.parametrize(
    ("name", "error", "told"),
    [
        ("reads", "FileNotFoundError('no input.txt')", " clauses  all with the same reason"),
        ("asks", "NotApplicable('question 2 is open')", "Nothing was judged: question 2 is open."),
        ("asks_what", "NotApplicable('what sets it?')", "Nothing was judged: what sets it?\n"),
    ],
)
def test_what_stops_every_clause_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, error: str, told: str
) -> None:
    (tmp_path / f"{name}.py").write_text(STUCK.format(error=error), encoding="utf-8")
    main(["run", "--subject", f"{tmp_path / name}.py:Stuck", "--clause", "INIT"])
    letter = capsys.readouterr().out
    assert told in letter
    assert letter.count("question 2 is open") in (0, 2)


def test_a_claim_that_fails_everywhere_is_doubted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = STUCK.replace("raise {error}", "return super().train(replace(recipe, optimizer=Recipe().optimizer))")
    text = f"from dataclasses import replace\nfrom conformance import Recipe\n{text}"
    (tmp_path / "only_adamw.py").write_text(text, encoding="utf-8")
    main(["run", "--subject", f"{tmp_path / 'only_adamw.py'}:Stuck", *(f"--clause=OPT-{n}" for n in (1, 3, 5, 14))])
    told = "Every clause that needs any-optimizer fails (OPT-1, OPT-3, OPT-5): if the stack has no such option"
    assert told in " ".join(capsys.readouterr().out.split())


def test_text_is_the_letter(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--clause", "PREC-1"]) == 0
    printed = capsys.readouterr().out
    assert "judged by 1 clause\n" in printed
    assert "Partial:" in printed


def test_list_has_every_clause(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(clause.id in printed and clause.source in printed for clause in catalogue().values())
    assert main(["list", "--format", "json"]) == 0
    assert [entry["id"] for entry in json.loads(capsys.readouterr().out)] == list(catalogue())


def test_explain_shows_the_mutants(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "opt-10"]) == 0
    printed = capsys.readouterr().out
    assert "A keyword that the optimizer class does not accept is an error." in printed
    assert "kwarg-typo-swallowed" in printed
    assert main(["explain", "OPT-10", "--format", "json"]) == 0
    assert [m["mutant"] for m in json.loads(capsys.readouterr().out)["mutants"]] == ["kwarg-typo-swallowed"]


def test_explain_takes_chapters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "tie", "--format", "json"]) == 0
    assert [clause["id"] for clause in json.loads(capsys.readouterr().out)] == [
        f"TIE-{number}" for number in range(1, 9)
    ]
    assert main(["explain", "TIE"]) == 0
    printed = capsys.readouterr().out
    assert printed.index("TIE-1 (must)") < printed.index("TIE-2 (must)")


def test_every_clause_can_be_explained(capsys: pytest.CaptureFixture[str]) -> None:
    explained = []
    for chapter in dict.fromkeys(clause.chapter for clause in catalogue().values()):
        assert main(["explain", chapter, "--format", "json"]) == 0
        told = json.loads(capsys.readouterr().out)
        explained += told if isinstance(told, list) else [told]  # a chapter may have one clause
    assert [entry["id"] for entry in explained] == list(catalogue())
    assert [entry["id"] for entry in explained if not entry["mutants"]] == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "--subject", "litgtp"], "Unknown subject 'litgtp'"),
        (["run", "--clause", "DECOY-1"], "Unknown clause 'DECOY-1': the nearest is DECAY-1."),
        (["run", "--deviations", "missing.toml"], "The deviations file missing.toml cannot be read"),
        (["run", "--report", "no/such/folder.json"], "no/such/folder.json cannot be written: there is no folder"),
        (["explain", "DECOY"], "Unknown clause 'DECOY': the nearest is DECAY."),
        (["report", "missing.json"], "missing.json"),
        (["report", "pyproject.toml", "--kill-matrix", "missing.json"], "The kill matrix missing.json cannot be read"),
        (["report", "pyproject.toml", "--findings", "missing"], "The folder of findings missing has no file *.md"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_help_teaches_by_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    assert "python -m conformance explain DECAY-4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "end"),
    [
        ("run --subjct reference", "unrecognized arguments: --subjct reference; did you mean --subject?"),
        ("run --reprt=x", "unrecognized arguments: --reprt=x; did you mean --report?"),
        ("run --updates 2", "--updates 2; --updates is an option of python -m conformance audit."),
        ("run --zzz", "unrecognized arguments: --zzz"),
    ],
)
def test_an_unknown_option_is_told_with_the_nearest_one(
    words: str, end: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 2
    assert capsys.readouterr().err.rstrip().endswith(end)
