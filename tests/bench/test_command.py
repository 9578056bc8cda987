"""python -m conformance.bench."""

import importlib.metadata
import json
import re
import signal
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conformance.bench import session
from conformance.bench.__main__ import main
from conformance.bench.card import describe_environment
from conformance.bench.cases import check_names, choose, collect
from conformance.bench.clock import Clock, Round
from conformance.bench.run import Run
from conformance.bench.summary import Row

LABEL = "CPU, small: no figure of this run says anything about a GPU"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the user's own configuration would break any pytest."""
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\naddopts = "--no-such-option"\n')
    monkeypatch.chdir(tmp_path)


def test_a_small_version_runs_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu", "--only", "optimizer step / tiny / AdamW foreach", "--only", "Paged"]) == 0
    printed, progress = capsys.readouterr()
    assert LABEL in printed
    reason = "bitsandbytes pages an optimizer's state through CUDA's unified memory only."
    assert f"bitsandbytes PagedAdamW8bit, fp32 was not measured: {reason}" in printed
    assert f"tiny, bitsandbytes PagedAdamW8bit, bf16: {reason}" in progress
    folder = tmp_path / "reports/latest/bench-cpu"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["label"], summary["schema"], summary["complete"]) == (LABEL, 2, True)
    assert summary["seconds"] > 0
    assert re.search(
        r"reports/latest/bench-cpu/summary.json and pytest-benchmark.json beside it, after \d+:\d\d\n", progress
    )
    assert summary["card"]["noise"]["low"] <= summary["card"]["noise"]["ratio"]
    assert {row["name"] for row in summary["rows"] if row["unavailable"] is None} == {
        "AdamW fused, fp32, against itself",
        "AdamW foreach, fp32",
        "AdamW foreach, bf16",
    }
    foreach = summary["rows"][1]
    assert foreach["interleaved"]["with"] == "AdamW fused, fp32"
    assert foreach["facts"]["floor arithmetic"] == "read p4 g4 m4 v4, write p4 m4 v4"
    assert foreach["floor_ms"] == pytest.approx(
        foreach["facts"]["parameters"] * 28 / summary["card"]["copy_bandwidth"] * 1e3
    )
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
        (["--device", "cpu", "--only", "no such row"], "--only 'no such row' matches no row's"),
        (["--device", "cpu", "--compare", "missing.json"], "The summary missing.json cannot be read"),
        (["--device", "cpu", "--compare", "a", "b", "c"], "--compare takes one file, or two, not 3."),
        (["--device", "cpu", "--out", "pyproject.toml"], "The folder pyproject.toml cannot be created: File exists."),
        (["--device", "cpu", "--out", "/proc/bench"], "The folder /proc/bench cannot be created"),
        (["--device", "cpu", "--limit", "0"], "--limit is 0, but must be a number of seconds above 0."),
        (["--device", "cpu", "--limit", "nan"], "--limit is nan, but must be"),
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
    card = {"name": "CPU", "copy_bandwidth": 1e10, "bf16_rate": 1e11, "noise": None}
    old = {"schema": 2, "label": "CPU, small", "environment": {"torch": "1.0"}, "card": card, "rows": []}
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
    assert capsys.readouterr().err.splitlines()[-1] == "Interrupted: the results of 1 row are kept."
    summary = json.loads((tmp_path / "reports/latest/bench-cpu/summary.json").read_text())
    assert (summary["complete"], len(summary["rows"])) == (False, 1)


def test_being_terminated_keeps_the_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, handler = Run.measured, signal.getsignal(signal.SIGTERM)

    def terminated(self: Run, *arguments: object) -> object:
        if self.rows:
            signal.raise_signal(signal.SIGTERM)  # as `timeout` does
        return original(self, *arguments)  # type: ignore[arg-type] # as they came

    monkeypatch.setattr(Run, "measured", terminated)
    assert main(["--device", "cpu", "--only", "foreach"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "Interrupted: the results of 1 row are kept."
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_killed_run_leaves_the_rows_that_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, seen = Run.measured, []

    def watched(self: Run, *arguments: object) -> object:
        unfinished = tmp_path / "reports/latest/bench-cpu/unfinished.json"
        seen.append(len(json.loads(unfinished.read_text())["rows"]) if unfinished.exists() else 0)
        return original(self, *arguments)  # type: ignore[arg-type] # as they came

    monkeypatch.setattr(Run, "measured", watched)
    assert main(["--device", "cpu", "--only", "foreach"]) == 0
    assert seen == list(range(len(seen)))
    assert len(seen) > 1
    assert [path.name for path in (tmp_path / "reports/latest/bench-cpu").glob("unfinished*")] == []


def test_what_pytest_breaks_on_costs_no_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Run.add

    def broken(self: Run, row: Row) -> None:
        if self.rows:
            raise TypeError("no such thing")
        original(self, row)

    monkeypatch.setattr(Run, "add", broken)
    assert main(["--device", "cpu", "--only", "foreach"]) == 1
    assert "Partial: not every row was measured." in capsys.readouterr().out
    summary = json.loads((tmp_path / "reports/latest/bench-cpu/summary.json").read_text())
    assert (summary["complete"], len(summary["rows"])) == (False, 1)


def test_results_that_cannot_be_written_are_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(session, "write_json", full)
    assert main(["--device", "cpu", "--only", "foreach"]) == 1
    printed, told = capsys.readouterr()
    assert "noise floor" in printed
    assert told.splitlines()[-1].endswith("No space left on device")


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


def test_a_checkout_that_is_not_installed_has_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    found = describe_environment(torch.device("cpu"))
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert found["gpt-conformance"] == f"{project['version']}, from a checkout"
    assert found["lightning"] == "not installed"


def test_help_needs_no_torch() -> None:
    code = "import sys; from conformance.bench.__main__ import build_parser; build_parser().format_help()"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_source_gives_cases() -> None:
    for device, quick in (("cpu", False), ("cpu", True), ("cuda", False), ("cuda", True)):
        cases = collect(torch.device(device), quick)  # refuses rows of one name, and companions that do not exist
        assert {case.group for case in cases} >= {"optimizer step", "training step"}
        for case in cases:
            if case.beside is not None:
                [other] = [o for o in cases if o.key == (case.group, case.size, case.beside)]
                assert other.priority <= case.priority


def test_what_is_wanted_most_runs_first() -> None:
    cases = collect(torch.device("cuda"), quick=False)
    assert choose(cases, []) == cases
    assert cases[0].name == "AdamW fused, fp32, against itself"
    names = [f"{case.size}, {case.name}" for case in cases]

    def place(part: str) -> int:
        return next(number for number, name in enumerate(names) if part in name)

    wanted = ["gpt2-124m, AdamW fused, fp32", "reference, bf16-mixed, AdamW fused, compiled", "transformers GPT2"]
    wanted += ["bf16-true", "llama-1.2b, reference", "llama-1.2b, AdamW fused", "chunks of 128", "1.2b, torchao"]
    assert [place(part) for part in wanted] == sorted(place(part) for part in wanted)


def test_the_run_takes_as_long_as_the_help_says() -> None:
    """Eight minutes on an H100, and one in a quick run; with room for rows to come."""
    started, ahead = 20.0, 100.0  # imports and the card twice; code compiled ahead
    cases = collect(torch.device("cuda"), quick=False)
    assert started + ahead + sum(case.seconds - case.compiling for case in cases) < 600
    assert started + sum(case.seconds for case in collect(torch.device("cuda"), quick=True)) < 120


def test_names_are_checked() -> None:
    one = collect(torch.device("cpu"), quick=True)[1]
    with pytest.raises(ValueError, match="two rows are named"):
        check_names([one, one])
    with pytest.raises(ValueError, match="there is no such row"):
        check_names([replace(one, beside="nothing")])
