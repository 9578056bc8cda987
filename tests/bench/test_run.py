"""A run of the bench on a fake device: what happens to cases that cannot be measured, and to the others."""

import gc
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from conformance.bench.bootstrap import Interval
from conformance.bench.case import Case, Prepared, Setting
from conformance.bench.clock import Clock, Round
from conformance.bench.columns import parameters_of
from conformance.bench.figures import make_row
from conformance.bench.measure import Measurement
from conformance.bench.plain import to_plain
from conformance.bench.run import Run, in_minutes
from conformance.bench.session import summarise
from conformance.bench.suite import run_suite
from conformance.bench.summary import Beside, Card, Row, Samples, missing
from conformance.bench.terminal import print_summary
from conformance.errors import Unavailable
from tests.bench.fake_device import FakeDevice

CARD = Card("Fake", copy_bandwidth=1e12, bf16_rate=5e14, dense_peak=None)


def beside(row: Row) -> Beside:
    """Return the ratio of a row that was interleaved."""
    assert row.interleaved is not None
    return row.interleaved


@pytest.fixture(scope="module", autouse=True)
def modules_are_left_out() -> Iterator[None]:
    """As the bench does before its rows: garbage is collected at each, a sixth of a second with all modules in it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Bench:
    """Makes cases on a fake device, and logs what is built and closed."""

    def __init__(self) -> None:
        self.device = FakeDevice(noise=0.01)
        self.log: list[str] = []

    def case(self, name: str, seconds: float = 1e-3, **keywords: Any) -> Case:
        def build(setting: Setting) -> Prepared:
            self.log.append(f"build {name}")
            return Prepared(
                lambda: self.device.work(seconds),
                facts={"floor bytes": 0.5e9},
                close=lambda: self.log.append(f"close {name}"),
            )

        return Case("group", "size", name, build, **keywords)

    def broken(self, name: str, error: BaseException, steps: int = 0, **keywords: Any) -> Case:
        """Raises when it is built, or after so many steps."""

        def build(setting: Setting) -> Prepared:
            left = steps

            def step() -> None:
                nonlocal left
                self.device.work(1e-3)
                left -= 1
                if left < 0:
                    raise error

            if not steps:
                raise error
            return Prepared(step)

        return Case("group", "size", name, build, **keywords)

    def run(self, *cases: Case, folder: Path, **keywords: Any) -> Run:
        self.console = Console(file=io.StringIO(), width=200)
        setting = Setting(torch.device("meta"))
        run = Run(setting, Clock(self.device), CARD, cases, console=self.console, **keywords)
        assert run_suite(run, folder / "benchmark.json", {"card": to_plain(CARD)})
        return run

    @property
    def printed(self) -> str:
        assert isinstance(self.console.file, io.StringIO)
        return self.console.file.getvalue()


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_rows_are_measured_and_written(bench: Bench, tmp_path: Path) -> None:
    run = bench.run(bench.case("A"), bench.case("B", 2e-3, beside="A"), folder=tmp_path)
    first, second = run.rows
    assert first.judged.low <= first.judged.median <= first.judged.high
    assert first.judged.median == pytest.approx(1.005, rel=0.02)
    assert first.share_of_floor == pytest.approx(0.5, rel=0.02)
    assert beside(second).with_ == "A"
    assert beside(second).ratio == pytest.approx(2.0, rel=0.02)
    assert first.doubts == second.doubts == ()
    assert len(second.samples_ms.device) == second.rounds == 30
    assert run.complete
    assert bench.log == ["build A", "build B", "close B", "close A"]  # A stays, since B is interleaved with it
    assert f"[2/2] size, B: {second.judged.median:.3f} ms" in bench.printed
    written = json.loads((tmp_path / "benchmark.json").read_text())
    assert [b["stats"]["rounds"] for b in written["benchmarks"]] == [30, 30]
    assert written["benchmarks"][1]["extra_info"]["interleaved"] == to_plain(second)["interleaved"]
    assert written["machine_info"]["card"]["name"] == "Fake"


def test_a_row_keeps_its_three_times_apart() -> None:
    rounds = [Round(device=1.0, wall=2.0, host=0.5)] * 5
    case = Case("training step", "size", "A", Bench().case("A").build, beside="B")
    found = make_row(case, Measurement(rounds, beside=[Round(1.0, 1.0, 1.0)] * 5), {}, CARD)
    assert (found.device_ms, found.judged.median, found.host_ms) == (Interval(1000, 1000, 1000), 2000, 500)
    assert found.samples_ms == Samples((1000,) * 5, (2000,) * 5)
    assert beside(found).ratio == 2.0  # a training step is judged by the wall


def test_the_peak_of_a_row_is_its_own(bench: Bench, tmp_path: Path) -> None:
    bench.device.allocate(1000)  # there before the run

    def build(setting: Setting) -> Prepared:
        free = bench.device.allocate(30)
        return Prepared(lambda: bench.device.work(1e-3), close=free)

    rows = [Case("group", "size", name, build, beside=beside) for name, beside in (("A", None), ("B", "A"))]
    run = bench.run(*rows, folder=tmp_path)
    assert [row.peak_allocated for row in run.rows] == [30, 30]


def test_a_companion_is_built_for_a_row_that_needs_it(bench: Bench, tmp_path: Path) -> None:
    other = bench.case("A")
    run = bench.run(bench.case("B", beside="A"), bench.case("C"), folder=tmp_path, companions=[other])
    assert [row.name for row in run.rows] == ["B", "C"]
    assert beside(run.rows[0]).with_ == "A"
    assert bench.log == ["build A", "build B", "close B", "close A", "build C", "close C"]


def test_what_cannot_be_measured_has_its_reason(bench: Bench, tmp_path: Path) -> None:
    run = bench.run(
        bench.broken("absent", Unavailable("the moon is not full.")),
        bench.broken("large", torch.OutOfMemoryError("CUDA out of memory.")),
        bench.broken("late", torch.OutOfMemoryError("CUDA out of memory."), steps=10),
        bench.broken("wrong", TypeError("no such thing"), steps=1),
        bench.case("A"),
        folder=tmp_path,
    )
    reasons = {row.name: row.unavailable for row in run.rows}
    assert reasons == {
        "absent": "the moon is not full.",
        "large": "out of memory.",
        "late": "out of memory.",
        "wrong": "failed: TypeError: no such thing",
        "A": None,
    }
    assert run.failed == ["wrong"]  # a defect; the others are no one's fault
    assert "Traceback" in bench.printed
    assert run.complete
    benchmarks = json.loads((tmp_path / "benchmark.json").read_text())["benchmarks"]
    assert [b["name"].partition("[")[2] for b in benchmarks] == ["group / size / A]"]


def test_without_room_for_two_a_row_is_measured_alone(bench: Bench, tmp_path: Path) -> None:
    alone = bench.case("B", beside="A")

    def build(setting: Setting) -> Prepared:
        if bench.log[-1] != "close A":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return alone.build(setting)

    large = Case("group", "size", "B", build, beside="A")
    run = bench.run(bench.case("A"), large, bench.case("C", beside="A"), folder=tmp_path)
    assert [row.unavailable for row in run.rows] == [None] * 3
    assert run.rows[1].interleaved is None
    assert run.rows[1].doubts == ("measured alone: the memory does not hold A beside it",)
    assert beside(run.rows[2]).with_ == "A"
    assert bench.log == ["build A", "close A", "build B", "close B", "build A", "build C", "close C", "close A"]


def test_a_row_whose_companion_is_not_there_is_measured_alone(bench: Bench, tmp_path: Path) -> None:
    run = bench.run(bench.broken("A", Unavailable("no A.")), bench.case("B", beside="A"), folder=tmp_path)
    assert run.rows[1].unavailable is None
    assert run.rows[1].doubts == ("measured alone: A is not there (no A.)",)
    with pytest.raises(ValueError, match="there is no such row"):
        bench.run(bench.case("B", beside="nothing"), folder=tmp_path)


def test_ctrl_c_keeps_the_rows(bench: Bench, tmp_path: Path) -> None:
    run = bench.run(bench.case("A"), bench.broken("B", KeyboardInterrupt(), steps=6), bench.case("C"), folder=tmp_path)
    assert [row.name for row in run.rows] == ["A"]
    assert run.interrupted
    assert not run.complete
    assert len(json.loads((tmp_path / "benchmark.json").read_text())["benchmarks"]) == 1


def test_a_lost_device_ends_the_run_in_words(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(setting: Setting) -> Prepared:
        def lost() -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        for name in ("synchronize", "release"):
            monkeypatch.setattr(bench.device, name, lost)
        return Prepared(lambda: None)

    run = bench.run(bench.case("A"), Case("group", "size", "B", lose), bench.case("C"), folder=tmp_path)
    assert [row.unavailable is None for row in run.rows] == [True, False, False]
    assert str(run.rows[2].unavailable).startswith("not run: the device was lost in B (RuntimeError: CUDA error")
    assert not run.complete


def test_compiled_code_is_forgotten_where_the_graph_changes(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards of other rows would cost the host time at every call."""
    monkeypatch.setattr(torch._dynamo, "reset", lambda: bench.log.append("reset"))
    graphs = {"A": "one", "B": "one", "C": "", "D": "two", "E": "one"}
    bench.run(*(bench.case(name, graph=graph) for name, graph in graphs.items()), folder=tmp_path)
    seen = [word for word in bench.log if not word.startswith("close")]
    assert seen == ["reset", "build A", "build B", "build C", "reset", "build D", "reset", "build E"]


def test_a_limit_leaves_out_what_would_exceed_it(bench: Bench, tmp_path: Path) -> None:
    late = Case("group", "size", "B", bench.case("B").build, seconds=50.0)
    run = bench.run(bench.case("A"), late, folder=tmp_path, limit=40.0)
    assert run.rows[1].unavailable == "not run: it would exceed the limit of 40 s."
    assert not run.complete


def test_the_limit_counts_what_is_used_and_goes_by_the_pace(bench: Bench, tmp_path: Path) -> None:
    run = bench.run(bench.case("A", priority=1), folder=tmp_path, limit=40.0, used=38.0)
    assert run.rows[0].unavailable == "not run: it would exceed the limit of 40 s."
    first, second = (Case("group", "size", name, bench.case(name).build, seconds=20.0) for name in "AB")
    run = bench.run(first, second, folder=tmp_path, limit=30.0)  # A takes under a second instead of 20
    assert [row.unavailable for row in run.rows] == [None, None]


def test_the_time_left_goes_by_what_was_measured(bench: Bench, tmp_path: Path) -> None:
    cases = [Case("group", "size", name, bench.case(name).build, seconds=20.0) for name in "ABC"]
    run = Run(Setting(torch.device("meta")), Clock(bench.device), CARD, cases)
    assert (run.seconds_left, in_minutes(run.seconds_left)) == (60.0, "1:00")
    run.rows.append(missing(cases[0], "not installed."))
    assert run.seconds_left == 40.0  # it took no time, which says nothing of the others
    run.rows.append(make_row(cases[1], Measurement([Round(1.0, 1.0, 1.0)]), {}, CARD))
    run.started -= 40.0
    assert run.seconds_left == pytest.approx(40.0, rel=0.01)  # twice as slow as an H100


def test_a_case_that_is_kept_gives_back_what_others_left(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the memory of the first row shows in the second one's as reserved."""
    monkeypatch.setattr(bench.device, "release", lambda: bench.log.append("release"))
    bench.run(bench.case("B", beside="A"), bench.case("A"), folder=tmp_path)
    assert bench.log[bench.log.index("close B") :] == ["close B", "release", "close A"]


def test_a_companion_that_cannot_be_closed_costs_no_row(bench: Bench, tmp_path: Path) -> None:
    def build(setting: Setting) -> Prepared:
        def close() -> None:
            raise RuntimeError("it does not close")

        return Prepared(lambda: bench.device.work(1e-3), close=close)

    bad = Case("group", "size", "A", build)
    run = bench.run(bench.case("B", beside="A"), bench.case("C"), folder=tmp_path, companions=[bad])
    assert [row.unavailable for row in run.rows] == [None, None]
    assert run.failed == ["A"]
    assert "it does not close" in bench.printed


def test_nobody_needs_to_read_the_progress(bench: Bench, tmp_path: Path) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    run = Run(Setting(torch.device("meta")), Clock(bench.device), CARD, [bench.case("A"), bench.case("B")])
    run.console = Console(file=Closed())
    run.console.on_broken_pipe = lambda: sys.exit(1)  # type: ignore[method-assign] # as it does, but for the streams
    assert run_suite(run, tmp_path / "benchmark.json", {})
    assert [row.unavailable for row in run.rows] == [None, None]


def test_garbage_is_not_collected_in_a_round(bench: Bench, tmp_path: Path) -> None:
    enabled: list[bool] = []

    def build(setting: Setting) -> Prepared:
        def step() -> None:
            enabled.append(gc.isenabled())
            bench.device.work(1e-3)

        return Prepared(step)

    run = bench.run(Case("group", "size", "A", build, rounds=5), folder=tmp_path)
    assert run.rows[0].rounds == 5
    assert enabled[-5:] == [False] * 5


def test_a_quick_run_takes_few_rounds(bench: Bench, tmp_path: Path) -> None:
    run = Run(Setting(torch.device("meta"), quick=True), Clock(bench.device), CARD, [bench.case("A")])
    assert run_suite(run, tmp_path / "benchmark.json", {})
    assert run.rows[0].rounds == 8


def test_the_users_pytest_configuration_does_not_matter(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\naddopts = "--no-such-option"\n')
    (tmp_path / "conftest.py").write_text("raise RuntimeError('not for the bench')\n")
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")
    monkeypatch.chdir(tmp_path)
    run = bench.run(bench.case("A"), folder=tmp_path)
    assert run.rows[0].unavailable is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["benchmark.json", "conftest.py", "pyproject.toml"]


def test_the_table_has_figures_reasons_and_doubts(bench: Bench, tmp_path: Path) -> None:
    run = bench.run(
        bench.case("A"),
        bench.case("B, against itself", beside="A"),
        bench.case("C", seconds=0.2e-3),  # half of the 0.5 ms that its bytes need
        bench.broken("D", Unavailable("no D.")),
        folder=tmp_path,
    )
    environment = dict.fromkeys(("gpu", "driver", "cuda", "torch", "python", "clocks", "throttle"), "some")
    summary = summarise(run, environment, ["the card is warm."])
    assert summary.card.noise is not None
    assert summary.card.noise.ratio == pytest.approx(1.0, abs=0.02)
    console = Console(file=io.StringIO(), width=200)
    print_summary(console, summary)
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    for expected in (
        "noise floor: a step took",
        "drift: one step, at several times of the run, differed by up to",
        "Doubt: the card is warm.",
        "drift of the host: its work for one step differed by up to",
        "device ms",
        "of floor",
        "D was not measured: no D.",
        "? C: 0.199 ms is less than the 0.500 ms that the memory needs",
    ):
        assert expected in printed, printed


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ([1_339_957_248], "1.34 billion parameters"),
        ([124_475_904, 124_475_904], "124.5 million parameters"),
        ([123.6e6, 124.5e6], "123.6 to 124.5 million parameters"),
        ([35_712], "35,712 parameters"),
        ([], ""),
    ],
)
def test_parameters_in_words(numbers: list[float], words: str) -> None:
    facts: list[dict[str, float | str]] = [{"parameters": number} for number in numbers]
    rows = [Row(group="g", size="s", name="n", unavailable="no", facts=known) for known in [*facts, {}]]
    assert parameters_of(rows) == words
