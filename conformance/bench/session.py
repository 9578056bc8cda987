"""What the command does: measure, print, write and compare."""

import argparse
import contextlib
import gc
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import torch
from rich.console import Console

from conformance.bench.card import describe_environment, doubts_about, drift_between, measure_card, slug
from conformance.bench.case import Case, Setting
from conformance.bench.cases import choose, collect
from conformance.bench.clock import Clock, CudaDevice, Device
from conformance.bench.compare import check_comparable, compare, only_in
from conformance.bench.measure import count_bytes
from conformance.bench.plain import to_plain
from conformance.bench.precompile import backward_with_forward, compile_ahead
from conformance.bench.run import Run, in_minutes
from conformance.bench.suite import run_suite
from conformance.bench.summary import SMALL, Card, Summary, noise_of, read_summary
from conformance.bench.terminal import print_comparison, print_summary
from conformance.errors import ClockError, UsageError
from conformance.report.result import replace_json, write_json

PUBLISHED = Path("reports/bench")  # complete runs, by card
UNFINISHED = "unfinished.json"  # the rows so far, which a killed process leaves behind
LONG = 300.0  # seconds of a limit in which compiling everything ahead, a minute or two, saves time
LATEST = Path("reports/latest")  # ignored by git: runs on the CPU, quick ones and parts


def make_console(stream: TextIO) -> Console:
    """Return a console that is wide enough for the table where there is no terminal."""
    return Console(file=stream, highlight=False, width=None if stream.isatty() else 200)


def compare_files(options: argparse.Namespace) -> int:
    """Compare two runs that were written before, and return the exit code."""
    old, new = map(read_summary, options.compare)
    return print_compared(old, new, across=options.across)


def print_compared(old: Summary, new: Summary, across: bool) -> int:
    """Print two runs beside each other, and return 1 if a row is slower than before.

    Raises:
        UsageError: if they have no row in common, or, unless ``across``, differ in card or versions.
    """
    if not across:
        check_comparable(old, new.environment, bool(new.label))
    found = compare(old, new)
    if not found:
        raise UsageError("the two runs have no row in common: nothing can be compared.")
    console = make_console(sys.stdout)
    print_comparison(console, found)
    for which, rows in (("earlier", only_in(old, new)), ("later", only_in(new, old))):
        if rows:
            console.print(f"only in the {which} run: {'; '.join(rows)}", style="dim", markup=False, soft_wrap=True)
    return int(any(comparison.verdict == "slower" for comparison in found))


def run_bench(options: argparse.Namespace) -> int:
    """Measure, print, write, and compare if asked to; return the exit code.

    Raises:
        UsageError: before anything is measured, if an option is wrong or nothing could be written afterwards.
        ClockError: if the clock cannot be trusted on this device.
    """
    started = time.perf_counter()
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise UsageError("the bench needs pytest-benchmark: install it with pip install 'gpt-conformance[bench]'.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "there is no CUDA device: run the bench on a machine with a GPU, or add `--device cpu` for a small "
            "version of the same code, whose figures say nothing about a GPU."
        )
    if options.limit is not None and not options.limit > 0:
        raise UsageError(f"--limit is {options.limit:g}, but must be a number of seconds above 0.")
    if len(options.compare) > 2:
        raise UsageError(f"--compare takes one file, or two, not {len(options.compare)}.")
    device = torch.device("cuda", torch.cuda.current_device()) if options.device == "cuda" else torch.device("cpu")
    setting = Setting(device, options.quick)
    old = read_summary(options.compare[0]) if options.compare else None
    everything = collect(device, options.quick)
    cases = choose(everything, options.only)
    environment = describe_environment(device)
    if old is not None and not options.across:
        check_comparable(old, environment, setting.small)
    make_folder(options.out or LATEST)  # now, and not after ten minutes
    threads = torch.get_num_threads()
    try:
        if setting.small:  # threads would only wait for each other
            torch.set_num_threads(1)
        with terminated_as_interrupted():
            return measure_all(options, setting, everything, cases, environment, old, started)
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Have SIGTERM (of ``timeout`` or a job's end) do what Ctrl-C does: the rows that were measured are kept."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def measure_all(
    options: argparse.Namespace,
    setting: Setting,
    everything: Sequence[Case],
    cases: Sequence[Case],
    environment: dict[str, str],
    old: Summary | None,
    started: float,
) -> int:
    """Measure the card, the cases and the card again, and show what came out; return the exit code.

    The limit counts from ``started``, by ``perf_counter``; ``everything`` has the cases that others are beside.
    """
    progress = make_console(sys.stderr)
    if not setting.small and (options.limit is None or options.limit >= LONG):
        cases = compile_ahead(cases, lambda line: progress.print(line, markup=False, highlight=False, soft_wrap=True))
    clock = Clock(Device() if setting.small else CudaDevice(setting.device))
    progress.print("Measuring the most that the card can do ...")
    begun = time.perf_counter()
    card, load = measure_card(clock, setting.device)
    environment |= load
    ready = time.perf_counter()
    used = ready - started + (ready - begun)  # the card is measured again at the end

    def keep(run: Run) -> None:
        """Keep the rows so far, in case that the process is killed."""
        with contextlib.suppress(OSError):  # told at the end
            unfinished.parent.mkdir(parents=True, exist_ok=True)
            replace_json(unfinished, to_plain(summarise(run, environment)))

    limits = {"limit": options.limit, "used": used}
    run = Run(setting, clock, card, cases, companions=everything, **limits, console=progress, keep=keep)
    unfinished = folder_for(options, run) / UNFINISHED
    # Garbage is collected before each case, to count its memory: a quarter of a second, unless modules are left out.
    importlib.import_module("torch._dynamo")  # the first case would import it
    gc.collect()
    gc.freeze()
    run.say(f"{len(cases)} rows, about {in_minutes(run.seconds_left)}", style="dim")
    with tempfile.TemporaryDirectory() as temporary:
        benchmark_json = Path(temporary) / "pytest-benchmark.json"
        with backward_with_forward():
            broke = not run_suite(run, benchmark_json, environment | {"card": to_plain(card)})
        if not run.rows:
            if broke:
                return 1
            raise KeyboardInterrupt
        doubts = doubts_about(card)
        if run.complete and not setting.small:
            doubts += measure_card_again(clock, setting.device, card, environment)
        took = time.perf_counter() - started
        summary = summarise(run, environment, doubts, took)
        unwritten = write_results(folder_for(options, run), summary, benchmark_json)
    if not unwritten:
        unfinished.unlink(missing_ok=True)
    print_summary(make_console(sys.stdout), summary)
    if unwritten:
        print(unwritten, file=sys.stderr)
        return 1
    named = f"{folder_for(options, run)}/summary.json and pytest-benchmark.json beside it"
    run.say(f"Written: {named}, after {in_minutes(took)}", style="dim")
    if run.interrupted:
        rows = f"{len(run.rows)} {'row' if len(run.rows) == 1 else 'rows'}"
        print(f"Interrupted: the results of {rows} are kept.", file=sys.stderr)
        return 1
    slower = print_compared(old, summary, across=True) if old is not None else 0
    return int(bool(slower or run.failed or broke))


def measure_card_again(clock: Clock, device: torch.device, card: Card, environment: dict[str, str]) -> list[str]:
    """Measure the card at the end of a run, and say how it changed; adds to the environment what throttled it."""
    count_bytes(clock.device)  # frees the last case
    try:
        end, load = measure_card(clock, device)
    except ClockError as error:  # as for every row: what was measured is kept
        return [f"at the end of the run: {error}"]
    environment["throttle at the end"] = load["throttle"]
    return drift_between(card, end)


def summarise(run: Run, environment: dict[str, str], doubts: Sequence[str] = (), took: float | None = None) -> Summary:
    """Return the summary of a run, with doubts about the card and the seconds that it took."""
    return Summary(
        label=SMALL if run.setting.small else None,
        environment=environment,
        card=replace(run.card, noise=noise_of(run.rows), doubts=tuple(doubts)),
        quick=run.setting.quick,
        complete=run.complete,
        seconds=took,
        rows=tuple(run.rows),
    )


def folder_for(options: argparse.Namespace, run: Run) -> Path:
    """Return where the results go: what is published holds whole runs only."""
    if options.out is not None:
        return Path(options.out)
    setting, card = run.setting, slug(run.card.name)
    whole = run.complete and not options.only and not setting.quick and not setting.small
    return PUBLISHED / card if whole else LATEST / ("bench-cpu" if setting.small else f"bench-{card}")


def write_results(folder: Path, summary: Summary, benchmark_json: Path) -> str:
    """Write the summary and pytest-benchmark's JSON; return what went wrong, for the table is still worth printing."""
    try:
        make_folder(folder)
        write_json(folder / "summary.json", to_plain(summary))
        if benchmark_json.exists():
            shutil.copyfile(benchmark_json, folder / "pytest-benchmark.json")
    except (OSError, UsageError) as error:
        return f"The results were not written into {folder}: {error}"
    return ""


def make_folder(folder: Path) -> None:
    """Make a folder with its parents. Raises UsageError if that cannot be, or nothing could be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the folder {folder} cannot be created: {error.strerror}.") from error
    if not os.access(folder, os.W_OK):
        raise UsageError(f"the results cannot be written into {folder}: permission denied.")
