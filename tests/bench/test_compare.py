"""Two runs of the bench beside each other."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conformance.bench.__main__ import main
from conformance.bench.compare import Comparison, check_comparable, compare
from conformance.bench.noise import device_drifts, host_drifts, noise_floor
from conformance.bench.plain import from_plain
from conformance.bench.summary import Summary, read_summary
from conformance.errors import UsageError

ENVIRONMENT = {"gpu": "NVIDIA H100 80GB HBM3", "torch": "2.11.0", "driver": "570.86.15"}


def row(name: str, milliseconds: float, seed: int, group: str = "optimizer step", rounds: int = 30) -> dict[str, Any]:
    """A row with 1 % of noise in its device times; the wall times are double."""
    device = list(milliseconds * np.exp(np.random.default_rng(seed).normal(0, 0.01, rounds)))
    samples = {"device": device, "wall": [2 * value for value in device]}
    row: dict[str, Any] = {"group": group, "size": "gpt2-124m", "name": name, "samples_ms": samples, "facts": {}}
    for clock, values in samples.items():
        row[f"{clock}_ms"] = {"median": float(np.median(values)), "low": min(values), "high": max(values)}
    return row | {"host_ms": milliseconds, "waits_for_host": False if group == "optimizer step" else None}


def summary(*rows: dict[str, Any], **environment: str) -> dict[str, Any]:
    return {
        "schema": 2,
        "label": None,
        "environment": ENVIRONMENT | environment,
        "card": {
            "name": "NVIDIA H100 80GB HBM3",
            "copy_bandwidth": 3e12,
            "bf16_rate": 7e14,
            "noise": {"ratio": 1.0, "low": 0.997, "high": 1.004},
        },
        "rows": list(rows),
    }


def parsed(plain: dict[str, Any]) -> Summary:
    return from_plain(Summary, plain, "summary")


def compared(old: dict[str, Any], new: dict[str, Any]) -> list[Comparison]:
    return compare(parsed(old), parsed(new))


OLD = summary(row("A", 3.0, 1), row("B", 3.0, 2), row("C", 3.0, 3), row("D", 3.0, 4, rounds=3))
NEW = summary(row("A", 3.06, 11), row("B", 2.94, 12), row("C", 3.0, 13), row("D", 9.0, 14, rounds=3), row("E", 1.0, 15))


def test_each_row_gets_a_verdict() -> None:
    found = {comparison.key[2]: comparison for comparison in compared(OLD, NEW)}
    assert {name: comparison.verdict for name, comparison in found.items()} == {
        "A": "slower",  # by the 2 % that was planted
        "B": "faster",
        "C": "ambiguous",
        "D": "ambiguous",  # three rounds
    }
    assert found["A"].ratio.low < 1.02 < found["A"].ratio.high
    assert noise_floor(parsed(OLD)) == pytest.approx(0.004)
    noisy = damaged(lambda summary: summary["card"]["noise"].update(high=1.05))
    for one, other in ((noisy, NEW), (NEW, noisy)):
        assert {comparison.verdict for comparison in compared(one, other)} == {"ambiguous"}


def test_a_training_step_is_compared_by_the_wall() -> None:
    slow = row("A", 3.0, 1, group="training step")
    slow["samples_ms"]["wall"] = [2 * value for value in slow["samples_ms"]["wall"]]
    [found] = compared(summary(row("A", 3.0, 1, group="training step")), summary(slow))
    assert (found.clock, found.verdict) == ("wall", "slower")


def interleaved(name: str, milliseconds: float, seed: int, beside_ms: float, host_ms: float = 3.0) -> dict[str, Any]:
    """A row that was interleaved with A, which took ``beside_ms`` on the device then, and ``host_ms`` on the host."""
    ratio = {"ratio": 1.0, "low": 0.99, "high": 1.01}
    beside = {"with": "A", "beside_ms": beside_ms, "beside_host_ms": host_ms} | ratio
    return row(name, milliseconds, seed) | {"interleaved": beside}


def test_two_runs_are_compared_no_finer_than_one_step_drifts_within_a_run() -> None:
    # A against B cancels it within a run; A alone says only how the device was clocked.
    drifting = summary(
        row("A", 3.0, 1), interleaved("B", 3.0, 2, beside_ms=3.5), interleaved("C", 3.0, 3, beside_ms=3.1)
    )
    assert device_drifts(parsed(drifting)) == {("optimizer step", "gpt2-124m"): pytest.approx(3.5 / 3.0 - 1, abs=0.01)}
    later = summary(row("A", 3.45, 11), row("B", 3.8, 12))
    assert device_drifts(parsed(later)) == {}
    for one, other, slower in ((drifting, later, "slower"), (later, drifting, "faster")):
        found = {comparison.key[2]: comparison for comparison in compared(one, other)}
        assert {name: comparison.verdict for name, comparison in found.items()} == {"A": "ambiguous", "B": slower}
        assert found["A"].noise == pytest.approx(3.5 / 3.0 - 1, abs=0.01)
    # A part without such a step drifts as much as the worst one of its run.
    others = [row("T", 3.0 * factor, seed, group="training step") for seed, factor in ((1, 1.0), (2, 1.1))]
    [_, _, training] = compared(
        summary(*drifting["rows"], others[0]), summary(row("A", 3, 1), row("B", 3, 2), others[1])
    )
    assert training.verdict == "ambiguous"


def test_what_waits_for_the_host_drifts_with_it() -> None:
    # The device is steady, but the host's work for A goes from 3.0 to 3.9 ms.
    busy = summary(row("A", 3.0, 1), interleaved("B", 3.0, 2, beside_ms=3.0, host_ms=3.9), row("C", 3.0, 3))
    assert host_drifts(parsed(busy)) == {("optimizer step", "gpt2-124m"): pytest.approx(0.3)}
    later = summary(row("A", 3.0, 11), row("B", 3.3, 12), row("C", 3.3, 13))
    for either in (busy, later):
        either["rows"][2]["waits_for_host"] = True
    found = {comparison.key[2]: comparison for comparison in compared(busy, later)}
    assert {name: comparison.verdict for name, comparison in found.items()} == {
        "A": "ambiguous",
        "B": "slower",  # its launches were ahead, whatever the host did
        "C": "ambiguous",
    }
    assert found["C"].noise == pytest.approx(0.3, abs=0.02)
    assert found["B"].noise < 0.02


def test_a_faster_card_of_the_same_model_is_no_faster_software() -> None:
    def rows(factor: float, seed: int) -> list[dict[str, Any]]:
        return [row("A", 3.0 * factor, seed), row("T", 3.0 * factor, seed, group="training step")]

    old, new = summary(*rows(1.0, 1)), summary(*rows(0.97, 2))
    assert [found.verdict for found in compared(old, new)] == ["faster", "faster"]
    new["card"]["bf16_rate"] *= 1.03  # of matrix products, which training consists of
    assert [found.verdict for found in compared(old, new)] == ["faster", "ambiguous"]
    assert [found.verdict for found in compared(new, old)] == ["slower", "ambiguous"]
    new["card"]["copy_bandwidth"] *= 1.03  # which bounds the optimizers
    assert [found.verdict for found in compared(old, new)] == ["ambiguous", "ambiguous"]
    new["card"]["name"] = "NVIDIA A10"  # compared on purpose
    assert [found.verdict for found in compared(old, new)] == ["faster", "faster"]


def test_what_was_not_measured_is_not_compared() -> None:
    absent = row("A", 1.0, 1) | {"unavailable": "out of memory."}
    assert compared(OLD, summary(absent)) == compared(summary(absent), OLD) == []


def test_other_cards_and_versions_are_refused() -> None:
    old = parsed(OLD)
    check_comparable(old, ENVIRONMENT | {"gpt-conformance": "0.2.0", "platform": "y"}, small=False)
    with pytest.raises(UsageError, match=r"torch 2\.11\.0 and 2\.12\.0.*--across"):
        check_comparable(old, ENVIRONMENT | {"torch": "2.12.0"}, small=False)
    with pytest.raises(UsageError, match="gpu NVIDIA H100 80GB HBM3 and NVIDIA A10"):
        check_comparable(old, ENVIRONMENT | {"gpu": "NVIDIA A10"}, small=False)
    with pytest.raises(UsageError, match="small on the CPU"):
        check_comparable(old, ENVIRONMENT, small=True)


def written(path: Path, content: object) -> str:
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def test_two_files_are_compared_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = written(tmp_path / "old.json", OLD), written(tmp_path / "new.json", NEW)
    assert main(["--compare", old, new]) == 1
    printed = capsys.readouterr().out
    assert "a difference counts only if it exceeds the noise of both runs" in printed
    assert "0.40%" in printed
    assert all(verdict in printed for verdict in ("slower", "faster", "ambiguous"))
    assert main(["--compare", old, old]) == 0
    other = written(tmp_path / "other.json", summary(row("C", 3.0, 13), torch="2.12.0"))
    assert main(["--compare", old, other]) == 2
    assert "torch 2.11.0 and 2.12.0" in capsys.readouterr().err
    assert main(["--compare", old, other, "--across"]) == 0
    nothing = written(tmp_path / "nothing.json", summary(row("Z", 3.0, 13)))
    assert main(["--compare", old, nothing]) == 2
    assert "no row in common" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot be read"),
        ("no JSON", "is not JSON"),
        ("[]", "is not a summary of the bench"),
        ('{"benchmarks": []}', "is not a summary of the bench"),
        (json.dumps(OLD | {"schema": 9}), "has schema 9"),
    ],
)
def test_what_is_no_summary_is_told(tmp_path: Path, content: str | None, expected: str) -> None:
    file = tmp_path / "summary.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=expected):
        read_summary(file)


def damaged(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    found = copy.deepcopy(OLD)
    change(found)
    return found


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update(environment=None),
        lambda s: s.update(card=[]),
        lambda s: s.update(rows={}),
        lambda s: s.update(rows=[1, 2]),
        lambda s: s["card"].update(noise={"low": "x", "high": 1.0}),
        lambda s: s["card"].pop("bf16_rate"),
        lambda s: s["card"].update(copy_bandwidth=0.0),
        lambda s: s["rows"][0].pop("name"),
        lambda s: s["rows"][0].pop("samples_ms"),
        lambda s: s["rows"][0]["samples_ms"].update(device=[]),
        lambda s: s["rows"][0]["samples_ms"].update(wall=["x"]),
        lambda s: s["rows"][0]["samples_ms"].update(wall=[0.0]),
        lambda s: s["rows"][0].pop("device_ms"),
        lambda s: s["rows"][0].update(host_ms=None),
        lambda s: s["rows"][0].update(interleaved={"with": "B", "beside_ms": "x"}),
        lambda s: s["rows"][0].update(interleaved={"beside_ms": 1.0, "beside_host_ms": 1.0}),
        lambda s: s["rows"][0].update(interleaved=[]),
        lambda s: s["rows"][0].pop("waits_for_host"),
        lambda s: s["rows"][0].update(waits_for_host="x"),
    ],
    ids=[f"fault {number}" for number in range(19)],
)
def test_a_damaged_summary_is_told(
    change: Callable[[dict[str, Any]], object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = written(tmp_path / "old.json", OLD), written(tmp_path / "new.json", damaged(change))
    assert main(["--compare", old, new]) == 2
    [sentence] = capsys.readouterr().err.splitlines()
    assert "new.json is damaged: summary" in sentence
    assert sentence.endswith(". Give the file that the bench wrote, or run the bench again.")


def test_rows_of_one_run_only_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = written(tmp_path / "old.json", OLD), written(tmp_path / "new.json", NEW)
    main(["--compare", old, new])
    assert "only in the later run: optimizer step, gpt2-124m, E" in capsys.readouterr().out
    main(["--compare", new, old])
    assert "only in the earlier run: optimizer step, gpt2-124m, E" in capsys.readouterr().out


def test_without_a_noise_floor_there_is_no_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unknown = damaged(lambda summary: summary["card"].update(noise=None))
    assert {found.verdict for found in compared(unknown, NEW)} == {"ambiguous"}
    assert main(["--compare", written(tmp_path / "a", unknown), written(tmp_path / "b", NEW)]) == 0
    assert "a run did not measure its noise floor, so nothing can be said" in capsys.readouterr().out


def test_the_folder_of_a_run_will_do(tmp_path: Path) -> None:
    written(tmp_path / "summary.json", OLD)
    assert read_summary(tmp_path) == parsed(OLD)
