"""One judgement of one subject, from options to exit code. The command line and the pytest plugin are its two doors."""

import contextlib
import gc
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from conformance.clause import Clause, catalogue, find_clauses
from conformance.deviations import load_deviations
from conformance.loading import load_subject
from conformance.options import FAILED, PASSED, Format, Options
from conformance.report.environment import environment
from conformance.report.result import Named, Report, plain, replace_json, report_of, require_writable, write_json
from conformance.session import Result, Session
from conformance.supervision import JOURNAL

if TYPE_CHECKING:
    from rich.console import Console


def in_order_for_this_machine(chosen: dict[str, Clause]) -> dict[str, Clause]:
    """Return the clauses as they are judged: one that may cost the process its GPU comes last where there is one."""
    if not torch.cuda.is_available():
        return chosen
    return dict(sorted(chosen.items(), key=lambda item: item[1].last))


class Sitting:
    """Judges clauses one by one and keeps the results. Use as a context manager.

    Raises:
        UsageError: when it is made, for a mistake in the options.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.report_file = None if options.report is None else require_writable(options.report)
        self.journal = Path(os.environ.pop(JOURNAL)) if JOURNAL in os.environ else None
        self.everything = catalogue()
        self.chosen = in_order_for_this_machine(find_clauses(options.clauses))
        deviations = load_deviations(options.deviations, self.everything) if options.deviations else {}
        self.session = Session(load_subject(options.subject), deviations, options.timeout)
        self.named = Named.of(self.session.subject)
        self.results: list[Result] = []
        self.environment = environment()
        self.before = gc.get_threshold(), torch.get_num_threads()
        # The traces of hundreds of runs live to the end, and by default Python walks them all again and again: a tenth
        # of the time. The tensors are tiny, and threads that compare them only wait for each other.
        gc.set_threshold(20_000, 10, 10)
        torch.set_num_threads(1)
        self.keep()

    def __enter__(self) -> "Sitting":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove what the runs wrote; put back the number of threads and what the garbage collector waits for."""
        thresholds, threads = self.before
        gc.set_threshold(*thresholds)
        torch.set_num_threads(threads)
        self.session.close()

    def judge(self, clause: Clause) -> Result:
        """Judge one clause."""
        if self.journal is not None:
            self.journal.with_suffix(".now").write_text(clause.id, encoding="utf-8")
        result = self.session.judge(clause)
        self.results.append(result)
        self.keep()
        return result

    def keep(self) -> None:
        """Bring the report up to date, so that a crash leaves what was judged, and no report of an earlier run."""
        for path in filter(None, (self.report_file, self.journal)):
            with contextlib.suppress(OSError):  # told at the end
                replace_json(path, self.report().as_json())

    def report(self) -> Report:
        """Return the report on what was judged so far."""
        return report_of(self.named, self.options.subject, self.results, list(self.everything), self.environment)

    def finish(self, console: "Console", verbose: bool = False, form: Format = "text") -> int:
        """Write the report, print the result to ``console``, and return the exit code."""
        from conformance.report.github import annotations
        from conformance.report.letter import print_letter

        report = self.report()
        written = None if self.report_file is None else write_json(self.report_file, report.as_json())
        if form == "json":
            console.out(json.dumps(report.as_json(), indent=2, ensure_ascii=False), highlight=False)
        elif form == "github":
            for line in annotations(report, self.everything):
                console.out(line, highlight=False)
        else:
            print_letter(console, report, self.everything, verbose)
        if written is not None:
            elsewhere = "" if written == self.report_file else f" ({self.report_file} could not be written)"
            # Not among output that a program reads.
            print(plain(f"Written: {written}{elsewhere}"), file=console.file if form == "text" else sys.stderr)
        return FAILED if report.failed else PASSED
