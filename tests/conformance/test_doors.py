"""Both doors as their users meet them: exit codes, sentences, the letter, the JSON, and silence elsewhere."""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import conformance.suites
from conformance.capabilities import CAPABILITIES
from conformance.clause import CHAPTERS, catalogue, clause
from conformance.cli import main
from conformance.recipe import Recipe
from conformance.session import OUTCOMES
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


class Hostile(Sound):
    """Its names and errors hold what a terminal, a markup language or an encoder stumbles over."""

    name = "x[/y] \x1b[31m\ud800"

    def train(self, recipe: Recipe) -> None:
        raise ValueError("[/bold] \x1b]0;title\x07 \udcff")


class Leaver(Forgetful):
    """Leaves the folder that it was called in."""

    def train(self, recipe: Recipe) -> None:
        os.chdir("/")
        super().train(recipe)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own to work in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")  # the user's; not ours
    return tmp_path


@pytest.fixture
def by_pytest(folder: Path, capfd: pytest.CaptureFixture[str]) -> Judge:
    """Run pytest in this process; gives exit code and output."""

    def run(*arguments: str, plugins: Any = (), plugin: bool = True) -> tuple[int, str]:
        options = ["-c", "pytest.ini", "-p", "no:cacheprovider", "-p", "no:benchmark"]  # both leave folders behind
        options += ["-p", "no:xdist"]  # wherever it is installed
        options += ["-p", "conformance.plugin"] * plugin + ["--pyargs", "conformance.suites"]
        code = pytest.main([*options, *arguments], plugins=list(plugins))
        return int(code), "".join(capfd.readouterr())

    return run


@pytest.fixture(params=["pytest", "run"])
def judge(request: pytest.FixtureRequest, by_pytest: Judge, capfd: pytest.CaptureFixture[str]) -> Judge:
    """Judge by either door."""

    def run(*arguments: str) -> tuple[int, str]:
        code = main(["run", *arguments])
        return code, "".join(capfd.readouterr())

    return by_pytest if request.param == "pytest" else run


def flat(text: str) -> str:
    """Text without its line breaks, which depend on the width of the terminal."""
    return " ".join(text.split())


# mistakes --------------------------------------------------------------------------------------------------------

MISTAKES = {
    "unknown subject": (["--subject", "refrence"], "nknown subject 'refrence'"),
    "not a Subject": (["--subject", "builtins:dict"], "is not a Subject: it needs an attribute 'name'"),
    "no such attribute": (["--subject", f"{HERE}:Nobody"], "no attribute 'Nobody'"),
    "adapter cannot be made": (["--subject", f"{HERE}:Licensed"], "raised RuntimeError: no licence found"),
    "adapter quits": (["--subject", f"{HERE}:Quits"], "raised SystemExit: usage: train.py CONFIG"),
    "unknown clause": (["--clause", "DECAI-1"], "nknown clause 'DECAI-1': the nearest is DECAY-1"),
    "no deviations": (["--deviations", "none.toml"], "none.toml cannot be read: No such file"),
    "bad deviations": (["--deviations", "pytest.ini"], "pytest.ini names 'pytest', which is not a clause"),
    "report in no folder": (["--report", "no/such/out.json"], "no/such/out.json cannot be written"),
    "report is a folder": (["--report", "."], "is a folder: give the path of a file"),
    "report is a device": (["--report", "/dev/null"], "/dev/null is not a regular file"),
    "report has too long a name": (["--report", "x" * 300], "cannot be written: File name too long"),
    "report has NUL in its name": (["--report", "a\0b"], "cannot be written: "),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_sentence(mistake: str, judge: Judge) -> None:
    arguments, sentence = MISTAKES[mistake]
    code, output = judge(*arguments)
    assert (code, len(output.splitlines())) == (2, 1), output
    assert sentence in output
    assert re.fullmatch(r"(Exit: )?[A-Z'].*\.\n", output)


def test_a_report_without_permission_is_a_mistake(judge: Judge, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("conformance.report.result.tempfile.NamedTemporaryFile", refuse)
    code, output = judge("--report", "out.json")
    sentence = f"The report {folder}/out.json cannot be written: permission denied.\n"
    assert (code, output.removeprefix("Exit: ")) == (2, sentence)


def test_several_processes_are_a_mistake(by_pytest: Judge) -> None:
    class Xdist:
        def pytest_addoption(self, parser: pytest.Parser) -> None:
            parser.addoption("--numprocesses", type=int)

    code, output = by_pytest("--numprocesses", "2", "--clause", "DECAY-1", plugins=[Xdist()])
    assert (code, output.count("\n")) == (2, 1)
    assert output.endswith("cannot be spread over processes: drop -n.\n")


def test_an_empty_selection_is_a_mistake(by_pytest: Judge) -> None:
    code, output = by_pytest("--subject", f"{HERE}:Sound", "-k", "no_such_test")
    assert code == 2
    assert "No clause was selected" in output
    assert "Traceback" not in output


# outcomes --------------------------------------------------------------------------------------------------------


def test_a_small_report(judge: Judge, folder: Path) -> None:
    code, output = judge("--clause", "DECAY-1", "--clause", "OPT-3", "--report", "out.json")
    report = json.loads((folder / "out.json").read_text())
    assert code == 0
    assert f"Written: {folder / 'out.json'}" in output
    assert "Partial:" in output
    assert sorted(path.name for path in folder.iterdir()) == ["out.json", "pytest.ini"]
    assert set(report) == {"schema", "subject", "environment", "partial", "summary", "clauses"}
    subject = {"name": "reference", "version": importlib.metadata.version("gpt-conformance"), "as_of": None}
    assert (report["schema"], report["partial"], report["subject"]) == (1, True, subject)
    assert report["summary"] == dict.fromkeys(OUTCOMES, 0) | {"pass": 2}
    assert [entry["id"] for entry in report["clauses"]] == ["OPT-3", "DECAY-1"]  # chapters in the order of the suite
    for entry in report["clauses"]:
        fields = ["id", "level", "requirement", "outcome", "expected", "seen", "reason", "seconds", "since", "part"]
        assert list(entry) == fields
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
    command = f"python -m conformance run --subject {HERE}:Forgetful --clause DECAY-1"
    assert f"  Repeat: {command}\n" in output
    assert "sound [beta] 1.2, judged by 1 clause\n" in output
    assert "Traceback" not in output


def test_verbose_shows_the_traceback(judge: Judge) -> None:
    code, output = judge("--subject", f"{HERE}:Forgetful", "--clause", "DECAY-1", "-v")
    assert (code, output.count("Traceback (most recent call last)")) == (1, 1)
    assert "in covered_once" in output


def test_a_declared_deviation_is_no_failure_until_it_is_fixed(judge: Judge, folder: Path) -> None:
    (folder / "known.toml").write_text('[DECAY-1]\nreason = "bug 7"\n')
    options = ["--clause", "DECAY-1", "--deviations", "known.toml", "--report", "out.json", "--subject"]
    for subject, code, outcome in (("Forgetful", 0, "deviates"), ("Sound", 1, "fixed")):
        seen, output = judge(*options, f"{HERE}:{subject}")
        assert (seen, f"{outcome.upper()} DECAY-1" in output, "bug 7" in output) == (code, True, True)
        assert "Traceback" not in output
        summary = json.loads((folder / "out.json").read_text())["summary"]
        assert summary == dict.fromkeys(OUTCOMES, 0) | {outcome: 1}


def test_a_bug_of_the_adapter_is_an_error(judge: Judge) -> None:
    code, output = judge("--subject", f"{HERE}:Buggy", "--clause", "DECAY-1")
    assert code == 1
    assert "ERROR DECAY-1" in output
    assert re.search(r"Reason: KeyError: 'typo' \[adapter: test_doors.py:\d+: raise KeyError", flat(output))
    assert not re.search("Traceback|FAIL|How to mend it", output)


def test_what_is_lacking_is_listed_once_with_its_reason(judge: Judge) -> None:
    code, output = judge("--subject", f"{HERE}:Sound", "--clause", "EMB")
    ids = [key for key, rule in catalogue().items() if rule.chapter == "EMB"]
    swapping = [key for key in ids if catalogue()[key].needs[0] == "stable-embedding"]
    assert code == 0
    assert f"{', '.join(swapping)}: lacks stable-embedding: stable-embedding was not built" in flat(output)
    assert f"Result: {len(ids)} n/a, " in output


def test_names_and_reasons_are_text(judge: Judge, folder: Path) -> None:
    code, output = judge("--subject", f"{HERE}:Hostile", "--clause", "DECAY-1", "--report", "out.json")
    assert code == 1
    assert r"x[/y] \x1b[31m\ud800" in output
    assert r"ValueError: [/bold] \x1b]0;title\x07 \udcff" in flat(output)
    assert "\x1b" not in output
    assert json.loads((folder / "out.json").read_text())["subject"]["name"] == r"x[/y] \x1b[31m\ud800"


def test_a_report_follows_a_link_and_stays_where_it_was_asked_for(judge: Judge, folder: Path) -> None:
    (folder / "real.json").write_text("old")
    (folder / "link.json").symlink_to("real.json")
    code, _ = judge("--subject", f"{HERE}:Leaver", "--clause", "DECAY-1", "--report", "link.json")
    assert (code, (folder / "link.json").is_symlink()) == (1, True)
    assert json.loads((folder / "real.json").read_text())["summary"]["fail"] == 1
    os.chdir(folder)


def test_results_are_not_lost_where_the_folder_is_gone(judge: Judge, folder: Path) -> None:
    (folder / "gone").mkdir()

    class Remover(Sound):
        def train(self, recipe: Recipe) -> None:
            shutil.rmtree(folder / "gone", ignore_errors=True)
            super().train(recipe)

    globals()["Remover"] = Remover
    code, output = judge("--subject", f"{HERE}:Remover", "--clause", "DECAY-1", "--report", "gone/out.json")
    written = re.search(r"Written: (\S+) \(\S+gone/out.json could not be written\)", output)
    assert code == 0
    assert written
    assert json.loads(Path(written[1]).read_text())["summary"]["pass"] == 1
    Path(written[1]).unlink()


def test_a_chapter_can_be_chosen_in_any_case(by_pytest: Judge) -> None:
    code, output = by_pytest("--subject", f"{HERE}:Sound", "--clause", "decay", "--collect-only", "-q")
    assert (code, output.count("test_decay.py::")) == (0, len([k for k in catalogue() if k.startswith("DECAY-")]))
    assert "test_optimizer.py" not in output


# the catalogue, and pytest without the plugin --------------------------------------------------------------------


def test_every_clause_has_an_id_of_its_own() -> None:
    written = []
    for file in Path(conformance.suites.__path__[0]).glob("test_*.py"):
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        written += [ast.literal_eval(call.args[0]) for call in calls if ast.unparse(call.func) == "clause"]
    assert sorted(written) == sorted(catalogue())
    assert all(re.fullmatch(rf"({'|'.join(CHAPTERS)})-[0-9]+", key) for key in written)
    assert list(dict.fromkeys(rule.chapter for rule in catalogue().values())) == list(CHAPTERS)


# How a sentence begins, or goes on, that hangs on the one before it.
HANGING = re.compile(r"^(it|its|they|their|so|that|those|these|this|both|and|but)\b|\bas above\b", re.IGNORECASE)


@pytest.mark.parametrize("identity", catalogue())
def test_a_requirement_stands_alone(identity: str) -> None:
    rule = catalogue()[identity]
    assert not HANGING.search(rule.requirement), rule.requirement
    assert rule.requirement.endswith(".")
    assert rule.requirement[0].isupper() or rule.requirement.startswith(("lr", "k "))


def test_the_plugin_is_missed_in_one_sentence(by_pytest: Judge) -> None:
    code, output = by_pytest(plugin=False)
    assert code == 2
    assert "The clauses need their plugin: add -p conformance.plugin to the command line." in output
    assert "Traceback" not in output


def documented() -> None:
    """It is right."""


BAD_CLAUSES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "is taken by test_each_tensor_once": ("DECAY-1", documented, {}),
    "is not a clause id": ("SPEED-1", documented, {}),
    "not a capability": ("DECAY-99", documented, {"needs": ("flight",)}),
    "has no docstring": ("DECAY-99", lambda: None, {}),
}


@pytest.mark.parametrize("message", BAD_CLAUSES)
def test_a_clause_that_is_wrong_is_refused(message: str) -> None:
    identity, function, changes = BAD_CLAUSES[message]
    before = catalogue()
    with pytest.raises(ValueError, match=message):
        clause(identity, why="w", mend="m", source="s", since="0.1", **changes)(function)
    assert catalogue() == before


FOREIGN = """
import sys
import time

def pytest_addoption(parser):
    parser.addoption("--report", dest="report", help="the report of somebody else's plugin")

def test_ordinary(pytestconfig):
    assert pytestconfig.getoption("report") == "theirs.xml"
    assert not [name for name in sys.modules if name.startswith("conformance")]
"""


def test_a_pytest_run_of_somebody_else_is_untouched(tmp_path: Path) -> None:
    addoption, test = FOREIGN.split("def test_ordinary")
    (tmp_path / "conftest.py").write_text(addoption)
    (tmp_path / "test_ordinary.py").write_text("import sys\ndef test_ordinary" + test)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--report", "theirs.xml"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"}
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert (ran.returncode, "1 passed" in ran.stdout) == (0, True), ran.stdout


# what a run may do to its judge ----------------------------------------------------------------------------------


class Ender(Sound):
    """Ends the whole process."""

    def train(self, recipe: Recipe) -> None:
        os._exit(0)


class Hanging(Sound):
    """Never ends, and swallows what would end it."""

    def train(self, recipe: Recipe) -> None:
        while True:
            try:
                time.sleep(60)
            except Exception:  # what a stack should not do
                continue


class Interrupted(Sound):
    """Its user loses patience at the second recipe."""

    calls = 0

    def train(self, recipe: Recipe) -> None:
        Interrupted.calls += 1
        if Interrupted.calls == 2:
            raise KeyboardInterrupt
        super().train(recipe)


def test_a_run_that_ends_the_process_is_an_error(judge: Judge, folder: Path) -> None:
    (folder / "out.json").write_text("the report of an earlier run")
    code, output = judge("--subject", f"{HERE}:Ender", "--clause", "DECAY-1", "--report", "out.json")
    assert code == 1
    assert "ERROR DECAY-1" in output
    assert "the run called os._exit(0)" in flat(output)
    assert json.loads((folder / "out.json").read_text())["summary"]["error"] == 1
    assert os._exit.__module__ == "posix", "put back"


def test_a_run_that_hangs_is_an_error(judge: Judge) -> None:
    code, output = judge("--subject", f"{HERE}:Hanging", "--clause", "DECAY-1", "--timeout", "0.3")
    assert code == 1
    assert "the run did not end within 0.3 s" in flat(output)


@pytest.mark.parametrize("timeout", ["0", "-1", "soon", "nan", "inf"])
def test_a_timeout_that_is_no_time_is_a_mistake(timeout: str, judge: Judge) -> None:
    code, output = judge(f"--timeout={timeout}")
    assert (code, output.count("\n")) == (2, 1)
    assert output.endswith(f"--timeout is '{timeout}': give a number of seconds above 0.\n")


def test_ctrl_c_keeps_what_was_judged(judge: Judge, folder: Path) -> None:
    Interrupted.calls = 0
    code, output = judge("--subject", f"{HERE}:Interrupted", "--clause", "DECAY", "--report", "out.json")
    assert code in (2, 130)  # pytest's code, and that of shells
    assert "Partial:" in output
    report = json.loads((folder / "out.json").read_text())
    assert 0 < len(report["clauses"]) < 8
    assert report["partial"]
