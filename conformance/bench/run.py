"""One run of the bench: it measures case after case and keeps the rows, whatever goes wrong."""

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from conformance.bench.case import Case, Prepared, Setting
from conformance.bench.cases import check_names
from conformance.bench.clock import Clock
from conformance.bench.figures import make_row
from conformance.bench.measure import MOST_WARM_UPS, SETTLE, Pedantic, compiler_for, count_bytes, measure, warm_up
from conformance.bench.plain import to_plain
from conformance.bench.summary import Card, Row, missing
from conformance.errors import Unavailable, describe_error

if TYPE_CHECKING:
    from rich.console import Console

SMALL_ROUNDS, QUICK_ROUNDS = 5, 8  # at most


@dataclass
class Built:
    """A case that lies in memory."""

    case: Case
    prepared: Prepared
    before: tuple[int, int]  # bytes allocated and reserved before it was built


class Run:
    """The state of a run."""

    def __init__(
        self,
        setting: Setting,
        clock: Clock,
        card: Card,
        cases: Sequence[Case],
        *,
        companions: Sequence[Case] = (),
        limit: float | None = None,
        used: float = 0.0,
        console: "Console | None" = None,
        keep: Callable[["Run"], None] | None = None,
    ) -> None:
        """Begin without rows.

        Args:
            setting: where and how large.
            clock: its mark is pytest-benchmark's timer.
            card: what the card can do at most.
            cases: the rows, in order.
            companions: all cases, to find those that others are interleaved with.
            limit: seconds for everything; the first row that would end later is not run, nor any after it.
            used: seconds of the limit that are used already, or needed after the rows.
            console: for the progress.
            keep: is called after each row, with this run, if given.

        Raises:
            ValueError: if a case is to be interleaved with one that does not exist.
        """
        self.setting, self.clock, self.card, self.cases = setting, clock, card, cases
        self.companions = {case.key: case for case in (*companions, *cases)}
        check_names(list(self.companions.values()))
        self.limit, self.used, self.console, self.keep = limit, used, console, keep
        self.rows: list[Row] = []
        self.failed: list[str] = []
        self.stopped = ""
        """Why nothing more is measured."""
        self.alone = ""
        """Why the case at hand is measured alone."""
        self.interrupted = self.lost = False
        self.kept: Built | None = None
        self.started = time.perf_counter()

    def run_case(self, case: Case, benchmark: Any) -> None:
        """Measure a case by pytest-benchmark's fixture and keep its row. Only a lost device or Ctrl-C ends the run."""
        if self.interrupted:
            return
        end = self.used + time.perf_counter() - self.started + case.seconds * self.pace
        if self.limit is not None and end > self.limit:
            self.stopped = f"not run: it would exceed the limit of {self.limit:.0f} s."
        if self.stopped:
            self.add(missing(case, self.stopped))
            return
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
            return
        row = row or missing(case, "out of memory.")
        if row.measured:
            if self.alone:
                row = replace(row, doubts=(*row.doubts, f"measured alone: {self.alone}"))
            benchmark.extra_info.update(to_plain(row))
            del benchmark.extra_info["samples_ms"]  # pytest-benchmark has the rounds itself
        self.add(row)

    def attempt(self, case: Case, pedantic: Pedantic, beside: bool) -> Row | None:
        """Return the row, or None if the memory does not suffice.

        Exceptions end here, so that nothing refers to their frames and the tensors in them when memory is counted next.
        """
        try:
            return self.measured(case, pedantic, self.companion(case) if beside else None)
        except Unavailable as reason:
            return missing(case, str(reason))
        except torch.OutOfMemoryError:
            return None
        except Exception as error:
            self.report_failure(case)
            row = missing(case, f"failed: {describe_error(error)}")
        try:
            self.clock.device.synchronize()
        except Exception as error:  # an illegal access, say: nothing runs in this process any more
            self.lost = True
            self.stopped = f"not run: the device was lost in {case.name} ({describe_error(error)})."
        return row

    def report_failure(self, case: Case) -> None:
        """Print the traceback of the exception at hand: a case that breaks is a defect."""
        self.failed.append(case.name)
        self.say(traceback.format_exc(), style="dim")

    def measured(self, case: Case, pedantic: Pedantic, companion: Built | None) -> Row:
        """Build a case, measure it and close it; keep it instead if later ones are interleaved with it."""
        if self.kept is not None and self.kept.case.key == case.key:
            built, self.kept = self.kept, None
            count_bytes(self.clock.device)  # gives back what the cases have left that were interleaved with it
        else:
            built = self.build(case)
        small = self.setting.small
        try:
            figures = measure(
                case,
                built.prepared,
                self.clock,
                pedantic,
                beside=None if companion is None else companion.prepared,
                before=built.before,
                most=SMALL_ROUNDS if small else QUICK_ROUNDS if self.setting.quick else case.rounds,
                most_warm_ups=SMALL_ROUNDS if small else MOST_WARM_UPS,
                settle=0.0 if small else SETTLE,
            )
            row = make_row(case, figures, built.prepared.facts | built.prepared.later_facts(), self.card)
        except BaseException:
            built.prepared.close()
            raise
        if companion is None and any(self.companion_of(later) is case for later in self.cases[len(self.rows) + 1 :]):
            self.kept = built
        else:
            built.prepared.close()
        return row

    def build(self, case: Case) -> Built:
        """Build a case, and remember what there was before."""
        if case.graph:
            compiler_for(case.graph)
        before = count_bytes(self.clock.device)
        return Built(case, case.build(self.setting), before)

    def companion_of(self, case: Case) -> Case | None:
        """Return the case that this one is interleaved with."""
        return None if case.beside is None else self.companions[case.group, case.size, case.beside]

    def companion(self, case: Case) -> Built | None:
        """Return the companion, built and warm; it stays in memory until another one is needed."""
        self.alone = ""
        wanted = self.companion_of(case)
        if self.kept is not None and self.kept.case not in (case, wanted):
            self.drop()
        if wanted is None or self.kept is not None:
            return self.kept if wanted is not None else None
        try:
            built = self.build(wanted)
            warm_up(built.prepared.step, Clock(self.clock.device))
            built.prepared.reset()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # its own row says more
            self.alone = f"{wanted.name} is not there ({error})"
            return None
        self.kept = built
        return built

    def drop(self) -> None:
        """Let go of the case that was kept; its memory is collected when it is counted next."""
        kept, self.kept = self.kept, None
        if kept is not None and not self.lost:  # every call would raise
            try:
                kept.prepared.close()
            except Exception:
                self.report_failure(kept.case)

    @property
    def complete(self) -> bool:
        """Whether every case has its row."""
        return not self.stopped and len(self.rows) == len(self.cases)

    @property
    def pace(self) -> float:
        """How much slower the rows so far were than on an H100. Those that were not measured took no time."""
        done = sum(case.seconds for case, row in zip(self.cases, self.rows) if row.measured)
        if done < max(10, 0.1 * sum(case.seconds for case in self.cases)):  # too little to go by
            return 0.05 if self.setting.small else 1.0
        return (time.perf_counter() - self.started) / done

    @property
    def seconds_left(self) -> float:
        """What the other rows take on an H100, times the pace so far."""
        return self.pace * sum(case.seconds for case in self.cases[len(self.rows) :])

    def add(self, row: Row) -> None:
        """Keep a row and print it."""
        self.rows.append(row)
        if self.keep is not None:
            self.keep(self)
        what = row.unavailable or f"{row.judged.median:.3f} ms"
        left = in_minutes(self.seconds_left)
        self.say(f"[{len(self.rows)}/{len(self.cases)}] {row.size}, {row.name}: {what} ({left} left)")

    def say(self, text: str, style: str = "none") -> None:
        """Print progress; if nobody reads it any more, go on in silence: the rows are worth more than the lines."""
        if self.console is None:
            return
        try:
            self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
        except (BrokenPipeError, SystemExit):  # rich makes the second of the first
            self.console = None


def in_minutes(seconds: float) -> str:
    """Return minutes and seconds: ``1:05``."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
