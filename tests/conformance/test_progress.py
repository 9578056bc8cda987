"""What the judge's commands show while they work, and which files they name."""

import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from conformance import progress
from conformance.catalogue import read_catalogue
from conformance.clause import find_clauses
from conformance.cli import main
from conformance.progress import shown, waiting


def test_without_a_terminal_waiting_prints_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream(io.StringIO):
        lines = 0

        def write(self, text: str) -> int:
            self.lines += text.count("\n")
            return super().write(text)

    monkeypatch.setattr(progress, "EVERY", 0.01)
    stream, until = Stream(), time.monotonic() + 10
    with waiting("Loading", Console(file=stream)):
        while stream.lines < 2 and time.monotonic() < until:
            time.sleep(0.01)
    assert stream.getvalue().splitlines()[:2] == ["Loading: 0 s so far"] * 2


def test_what_takes_no_time_is_not_waited_for() -> None:
    stream = io.StringIO()
    with waiting("Loading", Console(file=stream)):
        pass
    assert stream.getvalue() == ""


def test_on_a_terminal_something_shows_at_once() -> None:
    stream, until = io.StringIO(), time.monotonic() + 2
    with waiting("Loading [x]", Console(file=stream, force_terminal=True)):
        while "Loading [x] ..." not in stream.getvalue():
            assert time.monotonic() < until
            time.sleep(0.01)


def test_a_bar_names_the_clause() -> None:
    stream = io.StringIO()
    clauses = find_clauses(["TIE"], read_catalogue())
    console = Console(file=stream, force_terminal=True, width=100)
    assert list(shown(clauses.values(), console, "Mine")) == list(clauses.values())
    assert "Judging Mine: TIE-1" in stream.getvalue()


@pytest.mark.parametrize(("every", "lines"), [(1e9, 1), (0.0, 2)])
def test_a_long_chapter_has_more_than_a_line(monkeypatch: pytest.MonkeyPatch, every: float, lines: int) -> None:
    monkeypatch.setattr(progress, "EVERY", every)
    stream = io.StringIO()
    clauses = find_clauses(["TIE-1", "TIE-2"], read_catalogue())
    assert len(list(shown(clauses.values(), Console(file=stream), "Mine"))) == 2
    printed = stream.getvalue().splitlines()
    assert len(printed) == lines
    assert printed[-1].endswith("judged: 2 of 2")


def test_output_for_programs_names_the_report_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    assert main(["run", "--clause", "TIE-1", "--format", "github", "--report", str(file)]) == 0
    captured = capsys.readouterr()
    assert f"Written: {file}" in captured.err
    assert "Written" not in captured.out
