"""The command line: ``python -m conformance.bench``."""

import argparse
import gc
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conformance.subject import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from conformance.bench.case import Case, Setting

PUBLISHED = Path("reports/bench")  # complete runs, by card
LATEST = Path("reports/latest")  # ignored by git: runs on the CPU, quick ones and parts

# Each module has cases(device, quick) -> list[Case].
SOURCES = ("optimizer_step", "training", "peers")

EXAMPLES = """\
examples:
  python -m conformance.bench                                all rows, on the GPU (an H100: eight minutes)
  python -m conformance.bench --quick                        few rounds, the small model only (one minute)
  python -m conformance.bench --device cpu                   a small version, which says nothing about a GPU
  python -m conformance.bench --only 8bit --only "fused, fp32"   some rows
  python -m conformance.bench --compare old/summary.json     run, and compare with an earlier run
  python -m conformance.bench --compare old.json new.json    compare two earlier runs

exit code: 0 all is well, 1 a row is slower than before or broke, 2 the command line was wrong or there is no GPU
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code. A mistake of the user's is one sentence on stderr and 2."""
    from conformance.bench.clock import ClockError

    options = build_parser().parse_args(arguments)
    try:
        return compare_files(options) if len(options.compare) == 2 else run_bench(options)
    except UsageError as error:
        print(f"{str(error)[:1].upper()}{str(error)[1:]}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader (head, say) has seen enough; Python's exit must not write either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ClockError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)  # before the first row, or again while the results were written
        return 1


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        "python -m conformance.bench",
        description="What optimizers, precision and StableEmbedding cost on this GPU, against what it can do at most.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--quick", action="store_true", help="few rounds, few rows")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="TEXT",
        help="rows with it in 'group / size / name'; repeatable",
    )
    parser.add_argument(
        "--limit",
        type=float,
        metavar="SECONDS",
        help="for everything: end at the first row that would take longer; nothing is compiled ahead",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help=f"default: {PUBLISHED}/CARD; for a part of the rows in {LATEST}"
    )
    parser.add_argument(
        "--compare", nargs="+", default=[], type=Path, metavar="FILE", help="an earlier summary.json, or two of them"
    )
    parser.add_argument("--across", action="store_true", help="compare although card or versions differ")
    return parser


def make_console(stream: Any) -> "Console":
    """Wide enough for the table where there is no terminal."""
    from rich.console import Console

    return Console(file=stream, highlight=False, width=None if stream.isatty() else 200)


def compare_files(options: argparse.Namespace) -> int:
    """Compare two runs that were written before."""
    from conformance.bench.compare import read_comparable

    old, new = (read_comparable(path) for path in options.compare)
    return print_compared(old, new, options.across)


def print_compared(old: dict[str, Any], new: dict[str, Any], across: bool) -> int:
    """Print the comparison; 1 if a row became slower."""
    from conformance.bench.compare import check_comparable, compare, only_in
    from conformance.bench.table import print_comparison

    if not across:
        check_comparable(old, new)
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
    """Measure, print, write, and compare if asked to."""
    started = time.perf_counter()
    import torch

    from conformance.bench.card import describe_environment
    from conformance.bench.case import Setting
    from conformance.bench.compare import check_comparable, read_comparable

    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "there is no CUDA device: run the bench on a machine with a GPU, or add `--device cpu` for a small version "
            "that exercises the same code and says nothing about a GPU."
        )
    if options.limit is not None and not options.limit > 0:
        raise UsageError(f"--limit is {options.limit:g}, but must be a number of seconds above 0.")
    if len(options.compare) > 2:
        raise UsageError(f"--compare takes one file, or two, not {len(options.compare)}.")
    device = torch.device("cuda", torch.cuda.current_device()) if options.device == "cuda" else torch.device("cpu")
    setting = Setting(device, options.quick)
    old = read_comparable(options.compare[0]) if options.compare else None
    everything = collect(device, options.quick)
    cases = choose(everything, options.only)
    environment = describe_environment(device)
    if old is not None and not options.across:
        check_comparable(old, {"environment": environment, "label": setting.small})
    check_folder(options.out or LATEST)
    if options.out is not None:
        make_folder(options.out)  # now, and not after ten minutes

    threads = torch.get_num_threads()
    try:
        if setting.small:  # threads would only wait for each other
            torch.set_num_threads(1)
        with terminated_as_interrupted():
            return measure_all(options, setting, everything, cases, environment, old, started)
    finally:
        torch.set_num_threads(threads)


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Have SIGTERM (of ``timeout`` or a job's end) do what Ctrl-C does: the rows that were measured are kept."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def measure_all(
    options: argparse.Namespace,
    setting: "Setting",
    everything: "list[Case]",
    cases: "list[Case]",
    environment: dict[str, str],
    old: dict[str, Any] | None,
    started: float,
) -> int:
    """The run itself: the card, the cases, the card again, and what came out.

    Args:
        options: of the command line.
        setting: where and how large.
        everything: all cases, to find those that others are interleaved with.
        cases: those to run.
        environment: versions and machine.
        old: the summary to compare with.
        started: when the command began, by ``perf_counter``, since the limit counts from there.
    """
    from conformance.bench.card import doubts_about, drift_between, measure_card, slug
    from conformance.bench.clock import Clock, ClockError, CudaDevice, HostDevice
    from conformance.bench.measure import count_bytes
    from conformance.bench.precompile import backward_with_forward, compile_ahead
    from conformance.bench.run import Run, in_minutes
    from conformance.bench.suite import run_suite
    from conformance.bench.summary import make_summary
    from conformance.bench.table import print_summary
    from conformance.report.letter import write_json

    progress = make_console(sys.stderr)
    if not setting.small and options.limit is None:
        cases = compile_ahead(cases, lambda line: progress.print(line, markup=False, highlight=False, soft_wrap=True))
    clock = Clock(HostDevice() if setting.small else CudaDevice(setting.device))
    progress.print("Measuring what the card can do at most ...")
    begun = time.perf_counter()
    card, load = measure_card(clock, setting.device)
    environment |= load
    ready = time.perf_counter()
    run = Run(
        setting,
        clock,
        card,
        cases,
        environment=environment,
        companions=everything,
        limit=options.limit,
        used=ready - started + (ready - begun),  # the card is measured again at the end
        console=progress,
    )
    # Garbage is collected before each case, to count its memory: a quarter of a second, unless modules are left out.
    importlib.import_module("torch._dynamo")  # the first case would import it
    gc.collect()
    gc.freeze()
    run.say(f"{len(cases)} rows, about {run.time_left()}", style="dim")
    with tempfile.TemporaryDirectory() as temporary:
        written = Path(temporary) / "pytest-benchmark.json"
        with backward_with_forward():
            broke = not run_suite(run, written)
        if not run.rows:
            if broke:
                return 1
            raise KeyboardInterrupt
        doubts = doubts_about(card)
        if run.complete and not setting.small:
            count_bytes(clock.device)  # frees the last case
            try:
                end, load = measure_card(clock, setting.device)
                environment["throttle at the end"] = load["throttle"]
                doubts += drift_between(card, end)
            except ClockError as error:  # as for every row: what was measured is kept
                doubts.append(f"at the end of the run: {error}")
        took = time.perf_counter() - started
        summary = make_summary(environment, card, run.rows, setting, run.complete, doubts, took)
        whole = run.complete and not options.only and not setting.quick and not setting.small
        name = "bench-cpu" if setting.small else f"bench-{slug(card.name)}"
        folder = options.out or (PUBLISHED / slug(card.name) if whole else LATEST / name)
        unwritten = ""
        try:
            make_folder(folder)
            write_json(folder / "summary.json", summary)
            if written.exists():
                shutil.copyfile(written, folder / "pytest-benchmark.json")
        except (OSError, UsageError) as error:  # the table is still worth printing
            unwritten = f"The results were not written into {folder}: {error}"
    print_summary(make_console(sys.stdout), summary)
    if unwritten:
        print(unwritten, file=sys.stderr)
        return 1
    run.say(f"Written: {folder}/summary.json, after {in_minutes(took)}", style="dim")
    if run.interrupted:
        print(f"Interrupted: the {len(run.rows)} rows that were measured are kept.", file=sys.stderr)
        return 1
    slower = print_compared(old, summary, across=True) if old is not None else 0
    return int(bool(slower or run.failed or broke))


def collect(device: Any, quick: bool) -> "list[Case]":
    """All cases, in the order in which they run."""
    found: list[Case] = []
    for source in SOURCES:
        found += importlib.import_module(f"conformance.bench.{source}").cases(device, quick)
    return sorted(found, key=lambda case: case.priority)  # which keeps the order of equals


def choose(cases: "list[Case]", only: Sequence[str]) -> "list[Case]":
    """The cases that were asked for, and always the one that gives the noise floor. All, if none was asked for.

    Raises:
        UsageError: if a text is found in no case.
    """
    from conformance.bench.optimizer_step import AGAINST_ITSELF

    for text in only:
        if not any(text.lower() in " / ".join(case.key).lower() for case in cases):
            raise UsageError(f"--only {text!r} is in no row's 'group / size / name': try 'optimizer step' or '8bit'.")
    return [
        case
        for case in cases
        if not only
        or case.name.endswith(AGAINST_ITSELF)
        or any(text.lower() in " / ".join(case.key).lower() for text in only)
    ]


def check_folder(folder: Path) -> None:
    """Raise UsageError before the run if nothing could be written into the folder afterwards."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise UsageError(f"the results cannot be written: {existing} is a file, not a folder.")
    if not os.access(existing, os.W_OK):
        raise UsageError(f"the results cannot be written into {folder}: permission denied.")


def make_folder(folder: Path) -> None:
    """Make it with its parents. Raises UsageError if that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the folder {folder} cannot be made: {error.strerror}.") from error


if __name__ == "__main__":
    sys.exit(main())
