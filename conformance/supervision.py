"""Print a letter even if a run kills its own process: the judge works in a child, and the parent waits for it.

A crash in native code, a kill for memory or ``kill -9`` ends a process without a word. The child keeps a journal, from
which the parent prints what was judged until then.
"""

import os
import signal
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path

JOURNAL = "CONFORMANCE_JOURNAL"
"""Environment variable: where the child keeps its report. The clause that is judged stands in a file beside it."""


def supervised(work: Callable[[], int]) -> int:
    """Run ``work`` in a child process and return its exit code; if it is killed, print what was judged.

    Call it before PyTorch is imported: threads and a GPU do not survive a fork. Where there is no fork, the work is
    done here.
    """
    if not hasattr(os, "fork"):
        return work()
    with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
        os.environ[JOURNAL] = str(Path(folder) / "journal.json")
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            run_child(work)
        status = wait_for(child)
        if os.WIFSIGNALED(status):
            return tell_end(os.WTERMSIG(status), Path(folder) / "journal.json")
        return os.waitstatus_to_exitcode(status)


def run_child(work: Callable[[], int]) -> None:
    """Do the work, and end this process as Python would."""
    code = 1
    try:
        code = work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type] # there is an exception
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                code = code or 1
        os._exit(code)


def wait_for(child: int) -> int:
    """Wait for the child, and hand on to it the signals that reach only this process."""

    def hand_on(number: int, frame: types.FrameType | None) -> None:
        os.kill(child, number)

    # Ctrl-C reaches both, being one group; the child ends in its own way, and we wait for it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, hand_on)
    while True:
        try:
            return os.waitpid(child, 0)[1]
        except InterruptedError:
            continue


def tell_end(number: int, journal: Path) -> int:
    """Print the letter of what was judged, and what ended the process; return its exit code, as shells have it."""
    from rich.console import Console

    from conformance.clause import catalogue
    from conformance.errors import UsageError, signal_name
    from conformance.report.letter import print_letter
    from conformance.report.result import read_report

    now = journal.with_suffix(".now")
    clause = now.read_text(encoding="utf-8") if now.is_file() else ""
    while_judging = f" while {clause} was judged" if clause else ""
    try:
        console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 100, highlight=False)
        print_letter(console, read_report(journal), catalogue())
    except UsageError:  # it ended before the first clause
        pass
    print(
        f"{signal_name(number)} ended the process{while_judging}: the results above are those of the clauses judged "
        "before that. Usual causes are a crash in native code, a kill, and too little memory.",
        file=sys.stderr,
    )
    return 128 + number
