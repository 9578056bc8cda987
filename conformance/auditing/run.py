"""An audit from its beginning to its letter: around a block of code, or around a script."""

import contextlib
import os
import runpy
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from conformance.auditing.facts import Facts, Said
from conformance.auditing.judging import judge_alone, judge_together, merged, with_allowances
from conformance.auditing.output import heard
from conformance.auditing.processes import exchanged, place
from conformance.auditing.verdict import Verdict
from conformance.auditing.watcher import Auditor, Stopped
from conformance.errors import RunEnded
from conformance.options import INTERRUPTED
from conformance.recording.limits import no_sudden_exit
from conformance.report.environment import environment


@contextlib.contextmanager
def audited(
    updates: int = 4,
    then: Literal["stop", "go-on"] = "stop",
    expect: Mapping[str, str] | None = None,
    allow: Mapping[str, str] | None = None,
    strict: bool = False,
    done: Callable[[Verdict], None] | None = None,
) -> Iterator[Verdict]:
    """Record the training inside the block and judge it; see :func:`conformance.audit`.

    Args:
        updates: how many updates to record.
        then: ``stop`` ends the run after them; ``go-on`` lets it go on unwatched.
        expect: what the user expects of the run.
        allow: rules that may find something, with reasons.
        strict: count advice as a fault.
        done: is called on process 0 with the verdict, as soon as it is complete.
    """
    verdict = Verdict(strict=strict)
    tell_done = done or (lambda _: None)

    def finished(facts: Facts) -> None:
        verdict.facts, verdict.broken = facts, auditor.broken
        facts.rank, facts.world = place()
        verdict.environment = environment()
        if verdict.broken:
            tell_done(verdict)
            return
        together = exchanged(facts, judge_alone(facts, expect or {}))
        if together is None:
            return
        verdict.ranks, alone = together
        findings = [*merged([own for own in alone if own]), *judge_together(verdict.ranks, expect or {})]
        verdict.findings = with_allowances(findings, allow or {})
        tell_done(verdict)

    auditor = Auditor(updates, then == "stop", finished)

    def hear(text: str) -> None:
        if not auditor.over:
            auditor.facts.said.append(Said(auditor.done, text))

    with heard(hear) as loggers:
        auditor.loggers = loggers
        auditor.gates.enter()
        try:
            with threads_stopped_quietly():
                yield verdict
        except Stopped:
            pass
        finally:
            auditor.finish(ran=sys.exc_info()[0] in (None, Stopped))
            auditor.gates.close()


@contextlib.contextmanager
def threads_stopped_quietly() -> Iterator[None]:
    """Let the audit end a thread that trains without a traceback: that it ended there is no error of the script."""
    original = threading.excepthook

    def hook(given: threading.ExceptHookArgs, /) -> None:
        if not issubclass(given.exc_type, Stopped):
            original(given)

    threading.excepthook = hook
    try:
        yield
    finally:
        if threading.excepthook is hook:  # otherwise the script has set one of its own
            threading.excepthook = original


def run_script(
    command: Sequence[str], start: Callable[[], contextlib.AbstractContextManager[Verdict]]
) -> tuple[int, Verdict]:
    """Run a script, or a module after ``-m``, as Python would, inside an audit.

    Returns:
        The script's own exit code (0 if the audit ended it), and the verdict.
    """
    module = command[0] == "-m"
    name, arguments = (command[1], command[2:]) if module else (command[0], command[1:])
    kept_argv, kept_path = sys.argv[:], sys.path[:]
    sys.argv[:] = [name, *arguments]
    # As Python does: the folder of the script, or the current one for a module, comes first.
    sys.path[0:1] = [os.getcwd() if module else str(Path(name).resolve().parent)]
    code = 0
    try:
        with start() as verdict:
            try:
                with no_sudden_exit(everywhere=False):
                    if module:
                        runpy.run_module(name, run_name="__main__", alter_sys=True)
                    else:
                        runpy.run_path(name, run_name="__main__")
            except BaseException as raised:
                error = own(raised)
                if isinstance(error, Stopped):
                    raise error from None
                code = ended(error)
    finally:
        sys.argv[:], sys.path[:] = kept_argv, kept_path
    return code, verdict


def own(error: BaseException) -> BaseException:
    """Return what ended a script, where runpy stumbles over its emptied ``sys.argv`` afterwards."""
    if not isinstance(error, IndexError) or error.__context__ is None:
        return error
    return error.__context__ if "runpy" in traceback.extract_tb(error.__traceback__)[-1].filename else error


def ended(error: BaseException) -> int:
    """Return the exit code of a script that ended so, and print what Python would."""
    if isinstance(error, SystemExit):
        return exit_code(error)
    if isinstance(error, RunEnded):
        return error.status
    if isinstance(error, KeyboardInterrupt):  # where it came is of no interest: often in the audit's own part
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    tell(error)
    return 1


def exit_code(end: SystemExit) -> int:
    """Return the code of a SystemExit, and print its message, as Python does."""
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    print(end.code, file=sys.stderr)
    return 1


def tell(error: BaseException) -> None:
    """Print a script's error as Python would, without the lines of the audit and of runpy."""
    ours = str(Path(__file__).parent)
    first = error.__traceback__
    while first is not None and (
        first.tb_frame.f_code.co_filename.startswith(ours) or "runpy" in first.tb_frame.f_code.co_filename
    ):
        first = first.tb_next
    traceback.print_exception(type(error), error, first or error.__traceback__)
