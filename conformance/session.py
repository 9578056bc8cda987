"""One sitting with one subject: runs each recipe once, keeps the traces, and turns clauses into outcomes."""

import dataclasses
import inspect
import linecache
import shutil
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from conformance.clause import Clause, NotApplicable, Violation
from conformance.recipe import Recipe
from conformance.subject import POLICY_METHODS, Subject, describe_error

if TYPE_CHECKING:
    from torch import nn

    from conformance.recording.trace import Checkpoint, Trace

Outcome = Literal["pass", "fail", "deviates", "fixed", "n/a", "error"]
OUTCOMES: tuple[Outcome, ...] = ("pass", "fail", "deviates", "fixed", "n/a", "error")
STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"]
BAD: tuple[Outcome, ...] = ("fail", "fixed", "error")
"""Outcomes that make the exit code 1."""


class RunFailed(Exception):
    """A run that a clause needed did not end; its cause is what the stack or the adapter raised."""


class AdapterFailed(RunFailed):
    """The adapter itself raised: this says nothing about the stack."""


@dataclass(frozen=True)
class Attempt:
    """A run that was allowed to fail."""

    trace: "Trace"
    """What was recorded until then."""
    error: BaseException | None
    """What the stack raised; None if the run ended."""


@dataclass(frozen=True)
class Result:
    """The outcome of one clause."""

    clause: Clause
    outcome: Outcome
    expected: str = ""
    seen: str = ""
    reason: str = ""
    seconds: float = 0.0
    traceback: str = field(default="", compare=False)


class Session:
    """Runs recipes on a subject. Use as a context manager: its runs write into a folder that is removed at the end."""

    def __init__(self, subject: Subject, deviations: Mapping[str, str] | None = None) -> None:
        self.subject = subject
        self.deviations = dict(deviations or {})
        self.attempts: dict[Recipe, Attempt] = {}
        self.groups: dict[Recipe, list[Trace]] = {}
        self.directory = Path(tempfile.mkdtemp(prefix="conformance-"))

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove what the runs wrote."""
        shutil.rmtree(self.directory, ignore_errors=True)

    # what clauses ask for --------------------------------------------------------------------------------------

    def attempt(self, recipe: Recipe) -> Attempt:
        """Run a recipe that the stack may refuse, or take the earlier run of an equal one.

        Raises:
            AdapterFailed: if the adapter's own code raised.
        """
        from conformance.recording.recorder import record

        if recipe not in self.attempts:
            folder = Path(tempfile.mkdtemp(prefix="run-", dir=self.directory))
            error: BaseException | None = None
            with record(folder, recipe.zero_gradients, nan_gradient=recipe.nan_gradient) as trace:
                try:
                    self.subject.train(dataclasses.replace(recipe, directory=folder))
                except KeyboardInterrupt:
                    raise
                except BaseException as raised:  # SystemExit too: a stack that quits has not trained
                    error = raised
            self.attempts[recipe] = Attempt(trace, error)
        attempt = self.attempts[recipe]
        if attempt.error is not None and raised_by_adapter(attempt.error, self.subject):
            raise AdapterFailed(describe_error(attempt.error)) from attempt.error
        return attempt

    def trace(self, recipe: Recipe) -> "Trace":
        """The trace of a run that must end.

        Raises:
            RunFailed: if it did not, or nothing was seen in it.
        """
        attempt = self.attempt(recipe)
        if attempt.error is not None:
            reason = describe_error(attempt.error)
            if isinstance(attempt.error, SystemExit) and attempt.trace.messages:
                reason += f", after {attempt.trace.messages[-1].strip()!r}"  # argparse, say, prints why it quits
            raise RunFailed(reason) from attempt.error
        if not attempt.trace.forwards or not attempt.trace.updates:
            raise AdapterFailed(
                f"{type(self.subject).__name__}.train() ended, but {len(attempt.trace.forwards)} forwards with token "
                f"ids and logits and {len(attempt.trace.updates)} optimizer steps were seen: it must run the stack."
            )
        return attempt.trace

    def start(self, recipe: Recipe) -> "Trace":
        """The trace of a run that must get as far as its first forward; what happens later does not matter.

        Raises:
            RunFailed: if it did not.
        """
        attempt = self.attempt(recipe)
        return attempt.trace if attempt.trace.forwards else self.trace(recipe)

    def ranks(self, recipe: Recipe) -> "list[Trace]":
        """The traces of all ranks of a run on several processes.

        Raises:
            RunFailed: if a rank raised.
        """
        from conformance.recording.ranks import run_on_ranks

        if recipe not in self.groups:
            folder = Path(tempfile.mkdtemp(prefix="ranks-", dir=self.directory))
            self.groups[recipe] = run_on_ranks(self.subject, recipe, folder)
        return self.groups[recipe]

    def load(self, checkpoint: "Checkpoint") -> "nn.Module":
        """The plain eager module in a checkpoint."""
        from conformance.recording.isolation import quiet_and_deterministic

        with quiet_and_deterministic():
            module: nn.Module = self.subject.load(checkpoint)  # type: ignore[attr-defined] # claimed by not lacking it
        return module

    def offers(self) -> dict[str, Any]:
        """What a clause may name as its arguments."""
        return {
            "subject": self.subject,
            "trace": self.trace,
            "start": self.start,
            "attempt": self.attempt,
            "ranks": self.ranks,
            "load": self.load,
        }

    # judging ---------------------------------------------------------------------------------------------------

    def judge(self, clause: Clause) -> Result:
        """Judge one clause, handing it what its arguments name."""
        offers = self.offers()
        arguments = {name: offers[name] for name in inspect.signature(clause.function).parameters}
        return self.judge_call(clause, lambda: clause.function(**arguments))

    def judge_call(self, clause: Clause, call: Callable[[], None]) -> Result:
        """Judge one clause by calling its test."""
        lacking = next((need for need in clause.needs if need in self.subject.lacks), None)
        if lacking is not None:
            return Result(clause, "n/a", reason=f"lacks {lacking}: {self.subject.lacks[lacking]}")
        declared = self.deviations.get(clause.id)
        started = time.perf_counter()
        outcome: Outcome
        expected = seen = reason = trail = ""
        try:
            call()
            outcome = "pass"
            if declared is not None:
                outcome, reason = "fixed", f"declared as a deviation ({declared}), but it passes: remove the entry."
        except NotApplicable as error:
            outcome, reason = "n/a", str(error)
        except Violation as error:
            outcome, expected, seen = "fail", error.expected, error.seen
            trail = "".join(traceback.format_exception(error))
            if declared is not None:
                outcome, reason = "deviates", declared
        except KeyboardInterrupt:
            raise
        except RunFailed as error:
            outcome, reason, trail = "error", str(error), "".join(traceback.format_exception(error))
            if line := line_in_adapter(error.__cause__, self.subject):
                reason += f" [adapter: {line}]"
        except BaseException as error:
            outcome, reason, trail = "error", describe_error(error), "".join(traceback.format_exception(error))
            # Not a run but load(), or the policy: the adapter's, if the exception passed through it.
            line = line_in_adapter(error, self.subject)
            reason = f"{reason} [adapter: {line}]" if line else f"the suite itself broke: {reason}"
        return Result(clause, outcome, expected, seen, reason, time.perf_counter() - started, trail)


def adapter_files(subject: Subject) -> set[str]:
    """The files that the adapter's code lies in: of its classes, their bases, its policy, and loose functions."""
    files = set()
    for thing in (subject, subject.policy):
        for kind in type(thing).__mro__:
            files.add(getattr(sys.modules.get(kind.__module__), "__file__", None))
        for name in ("train", "load", *POLICY_METHODS):
            function = inspect.unwrap(getattr(thing, name, None))  # type: ignore[arg-type] # None has no __wrapped__
            files.add(getattr(getattr(function, "__code__", None), "co_filename", None))
    return {file for file in files if file is not None and not file.endswith(("typing.py", "types.py"))}


def frames(error: BaseException | None) -> list[tuple[str, int]]:
    """File and line of each frame of an exception's traceback, outermost first."""
    found, step = [], error.__traceback__ if error is not None else None
    while isinstance(step, TracebackType):
        found.append((step.tb_frame.f_code.co_filename, step.tb_lineno))
        step = step.tb_next
    return found


def raised_by_adapter(error: BaseException, subject: Subject) -> bool:
    """Whether the innermost frame is the adapter's, or the suite's on its behalf: then the fault is not the stack's.

    Frames of the standard library below it (a file that was not found, a module that was not there) do not count.
    """
    from conformance import recipe
    from conformance.recording import trace

    trail = [path for path, _ in frames(error)]
    while trail and is_standard_library(trail[-1]):
        trail.pop()
    return bool(trail) and trail[-1] in {*adapter_files(subject), recipe.__file__, trace.__file__}


def is_standard_library(path: str) -> bool:
    """Whether a source file came with Python itself."""
    return path.startswith("<frozen ") or (path.startswith(STANDARD_LIBRARY) and "site-packages" not in path)


def line_in_adapter(error: BaseException | None, subject: Subject) -> str:
    """The innermost line of the adapter that an exception passed through: ``file:line: code``."""
    files = adapter_files(subject)
    for path, line in reversed(frames(error)):
        if path in files:
            return f"{Path(path).name}:{line}: {linecache.getline(path, line).strip()}"
    return ""
