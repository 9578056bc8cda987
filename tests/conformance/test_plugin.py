"""The command line as its users meet it: exit codes, sentences, the letter, the JSON, and silence elsewhere."""

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import conformance.suites
from conformance.clause import CHAPTERS, catalogue, clause
from conformance.recipe import Recipe
from conformance.session import OUTCOMES
from conformance.subject import CAPABILITIES
from conformance.subjects.reference import ReferencePolicy

HERE = __name__
Judge = Callable[..., tuple[int, str]]


class Sound:
    """A stack of an embedding and a head."""

    name, version, policy = "sound [beta]", "1.2", ReferencePolicy()
    lacks: Mapping[str, str] = {key: f"{key} was not built" for key in CAPABILITIES if key != "gpt-shape"}
    frozen: tuple[str, ...] = ()

    def train(self, recipe: Recipe) -> None:
        model = nn.Sequential(nn.Embedding(recipe.vocab_size, 4), nn.Linear(4, recipe.vocab_size))
        trained = [tensor for name, tensor in model.named_parameters() if name not in self.frozen]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        for batch in recipe.batches():
            F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
            optimizer.step()


class Forgetful(Sound):
    """Forgets the head's bias: DECAY-1 fails."""

    frozen = ("1.bias",)


class Buggy(Sound):
    """An adapter with a fault of its own."""

    def train(self, recipe: Recipe) -> None:
        raise KeyError("typo")


class Licensed(Sound):
    """Cannot be made."""

    def __init__(self) -> None:
        raise RuntimeError("no licence found\nask your administrator")


class Quits(Sound):
    """Cannot be made either, and parses the command line."""

    def __init__(self) -> None:
        sys.exit("usage: train.py CONFIG")


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Judge:
    """Run pytest in a folder of its own, in this process; gives exit code and output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")  # the user's; not ours

    def run(*arguments: str, plugins: Any = ()) -> tuple[int, str]:
        options = ["-c", "pytest.ini", "-p", "no:cacheprovider", "-p", "no:benchmark"]  # both leave folders behind
        options += ["-p", "no:xdist"]  # wherever it is installed
        options += ["--pyargs", "conformance.suites"]
        code = pytest.main([*options, *arguments], plugins=list(plugins))
        return int(code), "".join(capfd.readouterr())

    return run


def flat(text: str) -> str:
    """Text without its line breaks, which depend on the width of the terminal."""
    return " ".join(text.split())


# mistakes --------------------------------------------------------------------------------------------------------

MISTAKES = {
    "unknown subject": (["--subject", "refrence"], "no subject 'refrence'"),
    "no Subject": (["--subject", "builtins:dict"], "is no Subject: it needs an attribute 'name'"),
    "no such attribute": (["--subject", f"{HERE}:Nobody"], "no attribute 'Nobody'"),
    "adapter cannot be made": (["--subject", f"{HERE}:Licensed"], "raised RuntimeError: no licence found"),
    "adapter quits": (["--subject", f"{HERE}:Quits"], "raised SystemExit: usage: train.py CONFIG"),
    "unknown clause": (["--clause", "DECAI-1"], "no clause 'DECAI-1'; the nearest is DECAY-1"),
    "no deviations": (["--deviations", "none.toml"], "none.toml cannot be read: No such file"),
    "bad deviations": (["--deviations", "pytest.ini"], "pytest.ini names 'pytest', which is no clause"),
    "report in no folder": (["--report", "no/such/out.json"], "no/such/out.json cannot be written"),
    "report is a folder": (["--report", "."], "is a folder: give the path of a file"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_sentence(mistake: str, judge: Judge) -> None:
    arguments, sentence = MISTAKES[mistake]
    code, output = judge(*arguments)
    assert (code, len(output.splitlines())) == (2, 1), output
    assert sentence in output
    assert re.fullmatch(r"Exit: [A-Z'].*\.\n", output)


def test_a_report_without_permission_is_a_mistake(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conformance.report.letter.os.access", lambda *_: False)
    assert judge("--report", "out.json") == (2, "Exit: The report out.json cannot be written: permission denied.\n")


def test_several_processes_are_a_mistake(judge: Judge) -> None:
    class Xdist:
        def pytest_addoption(self, parser: pytest.Parser) -> None:
            parser.addoption("--numprocesses", type=int)

    code, output = judge("--numprocesses", "2", "--clause", "DECAY-1", plugins=[Xdist()])
    assert (code, output.count("\n")) == (2, 1)
    assert output.endswith("cannot be spread over processes: drop -n.\n")


def test_an_empty_selection_is_a_mistake(judge: Judge) -> None:
    code, output = judge("--subject", f"{HERE}:Sound", "-k", "no_such_test")
    assert code == 2
    assert "No clause was selected" in output
    assert "Traceback" not in output


# outcomes --------------------------------------------------------------------------------------------------------


def test_a_small_report(judge: Judge, tmp_path: Path) -> None:
    code, output = judge("--clause", "DECAY-1", "--clause", "OPT-3", "--report", "out.json")
    report = json.loads((tmp_path / "out.json").read_text())
    assert code == 0
    assert "Written: out.json" in output
    assert "Partial:" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "pytest.ini"]
    assert set(report) == {"schema", "subject", "environment", "partial", "summary", "clauses"}
    assert (report["schema"], report["partial"], report["subject"]) == (
        1,
        True,
        {"name": "reference", "version": "0.1.0"},
    )
    assert report["summary"] == dict.fromkeys(OUTCOMES, 0) | {"pass": 2}
    assert [entry["id"] for entry in report["clauses"]] == ["OPT-3", "DECAY-1"]  # chapters in the order of the suite
    for entry in report["clauses"]:
        assert list(entry) == ["id", "level", "requirement", "outcome", "expected", "seen", "reason", "seconds"]
        assert (entry["level"], entry["outcome"], entry["expected"], entry["reason"]) == ("must", "pass", "", "")
        assert entry["requirement"] == catalogue()[entry["id"]].requirement
    packages = {"gpt-conformance", "torch", "lightning", "bitsandbytes", "grokadamw"}
    assert set(report["environment"]) == {"python", "platform", "processor", "cores", "gpu", "judged as"} | packages
    assert report["environment"]["torch"] == importlib.metadata.version("torch")


def test_a_failing_clause_is_a_finding(judge: Judge) -> None:
    decay = catalogue()["DECAY-1"]
    code, output = judge("--subject", f"{HERE}:Forgetful", "--clause", "DECAY-1")
    assert code == 1
    assert f"FAIL DECAY-1 {decay.requirement}" in flat(output)
    assert "Expected: each of 3 trainable tensors is in exactly one parameter group, once" in flat(output)
    assert "Seen: missing: 1.bias; more than once: none" in flat(output)
    assert f"Why it matters: {decay.why} How to mend it: {decay.mend}" in flat(output)
    command = f"python -m pytest --pyargs conformance.suites --subject {HERE}:Forgetful --clause DECAY-1"
    assert f"  Repeat: {command}\n" in output
    assert "sound [beta] 1.2, judged by 1 clauses" in output
    assert "Traceback" not in output


def test_verbose_shows_the_traceback(judge: Judge) -> None:
    code, output = judge("--subject", f"{HERE}:Forgetful", "--clause", "DECAY-1", "-v")
    assert (code, output.count("Traceback (most recent call last)")) == (1, 1)
    assert "in covered_once" in output


def test_a_declared_deviation_is_no_failure_until_it_is_fixed(judge: Judge, tmp_path: Path) -> None:
    (tmp_path / "known.toml").write_text('[DECAY-1]\nreason = "bug 7"\n')
    options = ["--clause", "DECAY-1", "--deviations", "known.toml", "--report", "out.json", "--subject"]
    for subject, code, outcome in (("Forgetful", 0, "deviates"), ("Sound", 1, "fixed")):
        seen, output = judge(*options, f"{HERE}:{subject}")
        assert (seen, f"{outcome.upper()} DECAY-1" in output, "bug 7" in output) == (code, True, True)
        assert "Traceback" not in output
        summary = json.loads((tmp_path / "out.json").read_text())["summary"]
        assert summary == dict.fromkeys(OUTCOMES, 0) | {outcome: 1}


def test_a_bug_of_the_adapter_is_an_error(judge: Judge) -> None:
    code, output = judge("--subject", f"{HERE}:Buggy", "--clause", "DECAY-1")
    assert code == 1
    assert "ERROR DECAY-1" in output
    assert re.search(r"Reason: KeyError: 'typo' \[adapter: test_plugin.py:\d+: raise KeyError", flat(output))
    assert not re.search("Traceback|FAIL|How to mend it", output)


def test_what_is_lacking_is_listed_once_with_its_reason(judge: Judge) -> None:
    code, output = judge("--subject", f"{HERE}:Sound", "--clause", "EMB")
    ids = [key for key, rule in catalogue().items() if rule.chapter == "EMB"]
    assert code == 0
    assert f"{', '.join(ids)}: lacks stable-embedding: stable-embedding was not built" in flat(output)
    assert f"Result: {len(ids)} n/a, " in output


def test_a_chapter_can_be_chosen_in_any_case(judge: Judge) -> None:
    code, output = judge("--subject", f"{HERE}:Sound", "--clause", "decay", "--collect-only", "-q")
    assert (code, output.count("test_decay.py::")) == (0, len([k for k in catalogue() if k.startswith("DECAY-")]))
    assert "test_optimizer.py" not in output


# the catalogue, and pytest without it ----------------------------------------------------------------------------


def test_every_clause_has_an_id_of_its_own() -> None:
    written = []
    for file in Path(conformance.suites.__path__[0]).glob("test_*.py"):
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        written += [ast.literal_eval(call.args[0]) for call in calls if ast.unparse(call.func) == "clause"]
    assert sorted(written) == sorted(catalogue())
    assert all(re.fullmatch(rf"({'|'.join(CHAPTERS)})-[0-9]+", key) for key in written)
    assert list(dict.fromkeys(rule.chapter for rule in catalogue().values())) == list(CHAPTERS)


def documented() -> None:
    """It is right."""


BAD_CLAUSES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "is taken by test_each_tensor_once": ("DECAY-1", documented, {}),
    "is no clause id": ("SPEED-1", documented, {}),
    "is no capability": ("DECAY-99", documented, {"needs": ("flight",)}),
    "has no docstring": ("DECAY-99", lambda: None, {}),
}


@pytest.mark.parametrize("message", BAD_CLAUSES)
def test_a_clause_that_is_wrong_is_refused(message: str) -> None:
    identity, function, changes = BAD_CLAUSES[message]
    before = catalogue()
    with pytest.raises(ValueError, match=message):
        clause(identity, why="w", mend="m", source="s", **changes)(function)
    assert catalogue() == before


ORDINARY = """
import sys
class Contract:
    clause_id = "7.2"  # a name that other people use too
CONTRACT = Contract()
def test_ordinary():
    assert not {"torch", "rich", "conformance.session"} & set(sys.modules)
"""


@pytest.mark.parametrize("name", ["clause_id", "clause"])
def test_the_plugin_is_silent_in_other_runs(tmp_path: Path, name: str) -> None:
    (tmp_path / "test_ordinary.py").write_text(ORDINARY.replace("clause_id", name))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"}
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert (ran.returncode, "1 passed" in ran.stdout) == (0, True), ran.stdout
    assert "gpt-conformance-" in ran.stdout  # among the plugins loaded
    assert not re.search("judged by|Result:|conformance: ", ran.stdout)
