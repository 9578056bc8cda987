"""A stack that kills its process: the letter still comes, with what was judged until then."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ADAPTER = """\
import ctypes, os, signal, sys
from pathlib import Path

sys.path.insert(0, {examples!r})
from plain_loop_adapter import PlainLoop

class Deadly(PlainLoop):
    def train(self, recipe):
        if recipe.optimizer.class_path.endswith("SGD"):
            {deed}
        super().train(recipe)
"""
DEEDS = {
    "SIGKILL": "os.kill(os.getpid(), signal.SIGKILL)",
    "SIGSEGV": "ctypes.string_at(0)",
    "SIGABRT": "os.abort()",
}
EXAMPLES = Path(__file__).parents[2] / "examples"


def judge(tmp_path: Path, deed: str, *options: str) -> "subprocess.CompletedProcess[str]":
    """Judge the deadly stack by two clauses: the first does not kill it."""
    text = ADAPTER.format(examples=str(EXAMPLES), deed=deed)
    (tmp_path / "deadly.py").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "conformance", "run", "--subject", "deadly:Deadly"]
    command += ["--clause", "INIT-2", "--clause", "OPT-1", *options]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "name", ["SIGKILL", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGSEGV", "SIGABRT"))]
)
def test_a_killed_process_still_gives_a_letter(name: str, tmp_path: Path) -> None:
    ended = judge(tmp_path, DEEDS[name], "--report", str(tmp_path / "report.json"))
    assert ended.returncode > 128
    assert f"{name} ended the process while OPT-1 was judged" in ended.stderr
    assert "judged by 1 clause" in ended.stdout
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert [row["id"] for row in report["clauses"]] == ["INIT-2"]
    assert report["partial"]


@pytest.mark.slow
def test_an_ordinary_run_ends_as_before(tmp_path: Path) -> None:
    ended = judge(tmp_path, "pass")
    assert ended.returncode in (0, 1)
    assert "judged by 2 clauses" in ended.stdout
    assert "ended the process" not in ended.stderr


def test_a_mistake_of_the_users_keeps_its_exit_code(tmp_path: Path) -> None:
    ended = judge(tmp_path, "pass", "--timeout", "never")
    assert ended.returncode == 2
    assert "--timeout" in ended.stderr
