"""Pipes, devices, links to themselves and impossible names, given to each command of the judge: one sentence."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from conformance import cli
from conformance.bench import __main__ as bench
from conformance.bench import page as bench_page

RESULT = {"schema": 1, "subject": {"name": "x", "version": "1"}, "environment": {}, "partial": True, "summary": {}}
ODD = ["x" * 300, "a\0b", "x/" * 2000, "\ud800", "loop", "fifo", "/dev/zero", "/dev/null/x/y"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    os.symlink("loop", "loop")
    os.mkdir("record")
    os.mkfifo("record/process-0.pt")
    Path("train.py").write_text("raise SystemExit('it was run')")
    Path("ok.json").write_text(json.dumps(RESULT | {"clauses": []}))


def told(capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int], *words: str) -> str:
    """The sentence that a wrong command line ends in."""
    capsys.readouterr()
    assert main(list(words)) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert len(line) < 400
    assert line.isprintable()
    return line


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: ascii(odd[:8]))
def test_an_odd_path_is_told(odd: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["report", odd],
        ["report", "ok.json", "--kill-matrix", odd],
        ["report", "ok.json", "--findings", odd],
        ["report", "ok.json", "--out", odd],
        ["diff", odd, odd],
        ["run", "--clause=DECAY-1", "--deviations", odd],
        ["run", "--clause=DECAY-1", "--report", odd],
        ["audit", "--trace", odd, "--", "train.py"],
        ["audit", "--", odd],
    ):
        told(capsys, cli.main, *words)
    told(capsys, bench.main, "--compare", odd, odd)
    told(capsys, bench_page.main, odd, "--out", "pages")


def test_a_record_that_is_a_pipe_is_not_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a regular file" in told(capsys, cli.main, "diff", "record", "record")


@pytest.mark.parametrize("value", ["nan", "inf", "1e400", "x", ""])
def test_an_expectation_that_is_no_number_is_told(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("lr", "clip", "seed"):
        assert "needs a number" in told(capsys, cli.main, "audit", "--expect", f"{name}={value}", "--", "train.py")


def test_a_package_that_cannot_be_run_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    os.mkdir("package")
    assert "that can be run" in told(capsys, cli.main, "audit", "--", "-m", "package")
