"""python -m conformance.bench."""

import json
from pathlib import Path

import pytest
import torch

from conformance.bench import __main__ as command
from conformance.bench.__main__ import main
from conformance.bench.clock import Clock, Round
from conformance.bench.run import Run

LABEL = "CPU, small: no figure of this run says anything about a GPU"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the user's own configuration would break any pytest."""
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\naddopts = "--no-such-option"\n')
    monkeypatch.chdir(tmp_path)


def test_a_small_version_runs_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu", "--only", "AdamW foreach", "--only", "graph"]) == 0
    printed, progress = capsys.readouterr()
    assert LABEL in printed
    assert "unavailable: AdamW fused, CUDA graph, fp32: a CUDA graph needs CUDA." in printed
    assert "[5/5] tiny, AdamW fused, CUDA graph, bf16: a CUDA graph needs CUDA. (0:00 left)" in progress
    folder = tmp_path / "reports/latest/bench-cpu"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["label"], summary["schema"], summary["complete"]) == (LABEL, 1, True)
    assert summary["card"]["noise"]["low"] <= summary["card"]["noise"]["ratio"]
    assert {row["name"] for row in summary["rows"] if row["unavailable"] is None} == {
        "AdamW fused, fp32, against itself",
        "AdamW foreach, fp32",
        "AdamW foreach, bf16",
    }
    foreach = summary["rows"][1]
    assert foreach["interleaved"]["with"] == "AdamW fused, fp32"
    assert foreach["facts"]["floor arithmetic"] == "read p4 g4 m4 v4, write p4 m4 v4"
    assert foreach["floor_ms"] == pytest.approx(35_712 * 28 / summary["card"]["copy_bandwidth"] * 1e3)
    benchmarks = json.loads((folder / "pytest-benchmark.json").read_text())["benchmarks"]
    assert benchmarks[0]["stats"]["median"] * 1e3 == pytest.approx(summary["rows"][0]["device_ms"]["median"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pyproject.toml", "reports"]  # nothing else is left


def test_without_cuda_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    [sentence] = capsys.readouterr().err.splitlines()
    assert sentence.startswith("There is no CUDA device: ")
    assert "--device cpu" in sentence


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--device", "cpu", "--only", "no such row"], "--only 'no such row' is in no row's"),
        (["--device", "cpu", "--compare", "missing.json"], "The summary missing.json cannot be read"),
        (["--device", "cpu", "--compare", "a", "b", "c"], "--compare takes one file, or two, not 3."),
        (["--device", "cpu", "--out", "pyproject.toml"], "The results cannot be written: pyproject.toml is a file"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(arguments) == 2
    printed, told = capsys.readouterr()
    assert told.startswith(expected)
    assert len(told.splitlines()) == 1
    assert printed == ""
    assert not (tmp_path / "reports").exists()


def test_other_versions_are_refused_before_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = {"schema": 1, "label": "CPU, small", "environment": {"torch": "1.0"}, "card": {"noise": None}, "rows": []}
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert main(["--device", "cpu", "--compare", "old.json"]) == 2
    assert "torch 1.0 and" in capsys.readouterr().err


def test_ctrl_c_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Run.measured

    def interrupted(self: Run, *arguments: object) -> object:
        if self.rows:
            raise KeyboardInterrupt
        return original(self, *arguments)  # type: ignore[arg-type] # as they came

    monkeypatch.setattr(Run, "measured", interrupted)
    assert main(["--device", "cpu", "--only", "foreach"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "Interrupted: the 1 rows that were measured are kept."
    summary = json.loads((tmp_path / "reports/latest/bench-cpu/summary.json").read_text())
    assert (summary["complete"], len(summary["rows"])) == (False, 1)


def test_a_clock_that_cannot_be_trusted_ends_the_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Clock.time

    def idle(self: Clock, step: object) -> Round:
        return original(self, lambda: None)

    monkeypatch.setattr(Clock, "time", idle)
    assert main(["--device", "cpu", "--only", "foreach"]) == 1
    assert "the clock does not see the work" in capsys.readouterr().err


def test_a_row_that_breaks_makes_the_run_fail(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Run, case: object) -> object:
        raise TypeError("no such thing")

    monkeypatch.setattr(Run, "build", broken)
    assert main(["--device", "cpu", "--only", "foreach"]) == 1
    assert "failed: TypeError: no such thing" in capsys.readouterr().out


def test_every_source_gives_cases() -> None:
    for quick in (False, True):
        cases = command.collect(torch.device("cpu"), quick)
        assert len({case.key for case in cases}) == len(cases)
        assert {case.group for case in cases} >= {"optimizer step", "training step"}
