"""One run of the bench: a pytest plugin that gives the cases to the suite and keeps the rows."""

import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch

from conformance.bench.card import Card
from conformance.bench.case import Case, Prepared, Setting, Unavailable
from conformance.bench.clock import Clock
from conformance.bench.measure import (
    MOST_WARM_UPS,
    SETTLE,
    Measurement,
    Pedantic,
    compiler_for,
    count_bytes,
    measure,
    warm_up,
)
from conformance.bench.summary import Row, empty_row, make_row
from conformance.subject import describe_error

if TYPE_CHECKING:
    from rich.console import Console

SMALL_ROUNDS, QUICK_ROUNDS = 5, 8  # at most


@dataclass
class Built:
    """A case that lies in memory."""

    case: Case
    prepared: Prepared
    before: tuple[int, int]
    """Bytes allocated and reserved before it was built."""


class Run:
    """The state of a run, and the hooks by which pytest takes part in it."""

    def __init__(
        self,
        setting: Setting,
        clock: Clock,
        card: Card,
        cases: Sequence[Case],
        *,
        environment: Mapping[str, str] | None = None,
        companions: Sequence[Case] = (),
        limit: float | None = None,
        used: float = 0.0,
        console: "Console | None" = None,
    ) -> None:
        """
        Args:
            setting: where and how large.
            clock: whose mark is pytest-benchmark's timer.
            card: what the card can do at most.
            cases: the rows, in order.
            environment: versions and machine, for pytest-benchmark's JSON.
            companions: all cases, to find those that others are interleaved with.
            limit: seconds for everything; from the first row on that would end later none is run, and each says so.
            used: seconds of the limit that are used already, or needed after the rows.
            console: for the progress.
        """
        self.setting, self.clock, self.card, self.cases = setting, clock, card, cases
        self.companions = {case.key: case for case in (*companions, *cases)}
        for case in self.companions.values():
            if case.beside is not None and (case.group, case.size, case.beside) not in self.companions:
                raise ValueError(f"{case.key} is to be interleaved with {case.beside!r}, which is no case.")
        self.environment = environment or {}
        self.limit, self.used, self.console = limit, used, console
        self.rows: list[Row] = []
        self.failed: list[str] = []
        self.stopped = ""
        self.alone = ""
        """Why nothing more is measured."""
        self.interrupted = self.lost = False
        self.kept: Built | None = None
        self.started = time.perf_counter()

    # ---- hooks

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test for each case."""
        if "case" in metafunc.fixturenames:
            metafunc.parametrize(
                "case",
                [
                    pytest.param(
                        case,
                        id=" / ".join(case.key),
                        marks=pytest.mark.benchmark(timer=self.clock.mark, group=f"{case.group}, {case.size}"),
                    )
                    for case in self.cases
                ],
            )

    @pytest.fixture
    def bench(self) -> "Run":
        """The run itself."""
        return self

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str]:
        """No dots: every row prints a line of its own."""
        return "", "", ""

    @pytest.hookimpl(tryfirst=True)
    def pytest_benchmark_generate_machine_info(self, config: pytest.Config) -> dict[str, Any]:
        """Instead of pytest-benchmark's own, which knows no GPU and takes seconds to find the CPU's name."""
        return dict(self.environment) | {"card": asdict(self.card)}

    # ---- one case

    def run_case(self, case: Case, benchmark: Any) -> None:
        """Measure a case and keep its row. Nothing but a lost device or Ctrl-C ends the run."""
        if self.interrupted:
            pytest.skip(self.stopped)
        if self.limit is not None and self.used + self.seconds + case.seconds * self.pace > self.limit:
            self.stopped = f"not run: it would exceed the limit of {self.limit:.0f} s."
        if self.stopped:
            self.add(empty_row(case, self.stopped))
            pytest.skip(self.stopped)
        used = False

        def pedantic(*arguments: Any, **keywords: Any) -> object:
            nonlocal used
            used = True
            return benchmark.pedantic(*arguments, **keywords)

        try:
            row = self.attempt(case, pedantic, beside=True)
            if row is None and case.beside is not None and not used:
                self.drop()
                self.alone = f"the memory does not hold {case.beside} beside it"
                row = self.attempt(case, pedantic, beside=False)
        except KeyboardInterrupt:
            self.interrupted, self.stopped = True, "interrupted"
            benchmark.has_error = True  # or pytest-benchmark takes the median of no rounds
            pytest.skip(self.stopped)
        if row is None:
            row = empty_row(case, "out of memory.")
        if row["unavailable"] is None:
            if self.alone:
                row["doubts"].append(f"measured alone: {self.alone}")
            benchmark.extra_info.update({name: row[name] for name in EXTRA})
        self.add(row)
        if not used:
            pytest.skip(row["unavailable"])

    def attempt(self, case: Case, pedantic: Pedantic, beside: bool) -> Row | None:
        """The row, or None if the memory does not suffice.

        Exceptions end here, so that nothing refers to their frames and the tensors in them when memory is counted next.
        """
        try:
            return self.measured(case, pedantic, self.companion(case) if beside else None)
        except Unavailable as reason:
            return empty_row(case, str(reason))
        except torch.OutOfMemoryError:
            return None
        except Exception as error:
            self.report_failure(case)
            row = empty_row(case, f"failed: {describe_error(error)}")
        try:
            self.clock.device.synchronize()
        except Exception as error:  # an illegal access, say: nothing runs in this process any more
            self.lost = True
            self.stopped = f"not run: the device was lost in {case.name} ({describe_error(error)})."
        return row

    def report_failure(self, case: Case) -> None:
        """The traceback of the exception at hand, since a case that breaks is a defect."""
        self.failed.append(case.name)
        self.say(traceback.format_exc(), style="dim")

    def measured(self, case: Case, pedantic: Pedantic, companion: Built | None) -> Row:
        """Build, measure, close. A case that later ones are interleaved with is kept."""
        if self.kept is not None and self.kept.case.key == case.key:
            built, self.kept = self.kept, None
            count_bytes(self.clock.device)  # gives back what the cases have left that were interleaved with it
        else:
            built = self.build(case)
        try:
            figures: Measurement = measure(
                case,
                built.prepared,
                self.clock,
                pedantic,
                beside=None if companion is None else companion.prepared,
                before=built.before,
                most=SMALL_ROUNDS if self.setting.small else QUICK_ROUNDS if self.setting.quick else case.rounds,
                most_warm_ups=SMALL_ROUNDS if self.setting.small else MOST_WARM_UPS,
                settle=0.0 if self.setting.small else SETTLE,
            )
            facts = built.prepared.facts
            if built.prepared.later_facts is not None:
                facts = facts | built.prepared.later_facts()
            row = make_row(case, figures, facts, self.card)
        except BaseException:
            close(built)
            raise
        if companion is None and any(self.companion_of(later) is case for later in self.cases[len(self.rows) + 1 :]):
            self.kept = built
        else:
            close(built)
        return row

    def build(self, case: Case) -> Built:
        """Build a case, and remember what there was before."""
        if case.graph:
            compiler_for(case.graph)
        before = count_bytes(self.clock.device)
        return Built(case, case.build(self.setting), before)

    def companion_of(self, case: Case) -> Case | None:
        """The case that this one is interleaved with."""
        return None if case.beside is None else self.companions[case.group, case.size, case.beside]

    def companion(self, case: Case) -> Built | None:
        """The companion, built and warm; it stays in memory until another one is needed."""
        self.alone = ""
        wanted = self.companion_of(case)
        if self.kept is not None and self.kept.case not in (case, wanted):
            self.drop()
        if wanted is None or self.kept is not None:
            return self.kept if wanted is not None else None
        try:
            built = self.build(wanted)
            warm_up(built.prepared.step, Clock(self.clock.device))
            if built.prepared.reset is not None:
                built.prepared.reset()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # its own row tells more
            self.alone = f"{wanted.name} is not there ({error})"
            return None
        self.kept = built
        return built

    def drop(self) -> None:
        """Let go of the case that was kept; its memory is collected when it is counted next."""
        kept, self.kept = self.kept, None
        if kept is not None and not self.lost:  # every call would raise
            try:
                close(kept)
            except Exception:
                self.report_failure(kept.case)

    # ---- progress

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.started

    @property
    def complete(self) -> bool:
        """Whether every case has its row."""
        return not self.stopped and len(self.rows) == len(self.cases)

    @property
    def pace(self) -> float:
        """How much slower the rows so far were than on an H100. Those that were not measured took no time."""
        done = sum(case.seconds for case, row in zip(self.cases, self.rows) if row["unavailable"] is None)
        if done < max(10, 0.1 * sum(case.seconds for case in self.cases)):  # too little to go by
            return 0.05 if self.setting.small else 1.0
        return self.seconds / done

    @property
    def seconds_left(self) -> float:
        """By what the rows left take on an H100, and how much slower or faster it has been so far."""
        return self.pace * sum(case.seconds for case in self.cases[len(self.rows) :])

    def add(self, row: Row) -> None:
        """Keep a row and print it."""
        self.rows.append(row)
        what = row["unavailable"] or f"{row['device_ms']['median']:.3f} ms"
        self.say(f"[{len(self.rows)}/{len(self.cases)}] {row['size']}, {row['name']}: {what} ({self.time_left()} left)")

    def time_left(self) -> str:
        """In minutes and seconds: ``1:05``."""
        return in_minutes(self.seconds_left)

    def say(self, text: str, style: str = "none") -> None:
        """Print progress; if nobody reads it any more, go on in silence: the rows are worth more than the lines."""
        if self.console is None:
            return
        try:
            self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
        except (BrokenPipeError, SystemExit):  # rich makes the second of the first
            self.console = None


# What of a row goes into pytest-benchmark's JSON; its own figures are the device times.
EXTRA = (
    "wall_ms",
    "host_ms",
    "waits_for_host",
    "facts",
    "floor_ms",
    "share_of_floor",
    "tokens_per_second",
    "mfu",
    "peak_allocated",
    "peak_reserved",
    "interleaved",
    "doubts",
)


def close(built: Built) -> None:
    """Free what the garbage collector would not."""
    if built.prepared.close is not None:
        built.prepared.close()


def in_minutes(seconds: float) -> str:
    """``1:05``."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
