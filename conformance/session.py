"""Judging: from a clause and the runs of one subject to an outcome."""

import importlib.util
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from conformance.blame import line_in_adapter
from conformance.clause import PACKAGES, Clause
from conformance.errors import NotApplicable, RunFailed, Violation, describe_error
from conformance.runs import TIMEOUT, Runs, newer
from conformance.subject import Subject
from conformance.version import DISTRIBUTION, is_newer

Outcome = Literal["pass", "fail", "deviates", "fixed", "n/a", "error"]
OUTCOMES: tuple[Outcome, ...] = ("pass", "fail", "deviates", "fixed", "n/a", "error")
BAD: tuple[Outcome, ...] = ("fail", "fixed", "error")
"""Outcomes that make the exit code 1."""


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
    """One sitting with one subject. Use as a context manager: it owns the folder that the runs write into."""

    def __init__(
        self, subject: Subject, deviations: Mapping[str, str] | None = None, timeout: float | None = TIMEOUT
    ) -> None:
        self.subject = subject
        self.runs = Runs(subject, timeout)
        self.deviations = dict(deviations or {})
        self.lost_gpu_in = ""
        """The clause in whose run a device-side assert left the GPU useless for this process."""

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove what the runs wrote."""
        self.runs.close()

    def judge(self, clause: Clause) -> Result:
        """Return the outcome of one clause. Whatever the stack, the adapter or the clause raises becomes one."""
        if reason := self.not_asked(clause):
            return Result(clause, "n/a", reason=reason)
        if self.lost_gpu_in:
            reason = f"a device-side assert in {self.lost_gpu_in} left the GPU useless for this process: judge this "
            return Result(clause, "error", reason=f"{reason}clause in a run of its own, with --clause {clause.id}")
        declared = self.deviations.get(clause.id)
        started = time.perf_counter()
        outcome: Outcome
        expected = seen = reason = trail = ""
        try:
            clause.test(self.runs)
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
        if "device-side assert" in trail:
            self.lost_gpu_in = clause.id
        return Result(clause, outcome, expected, seen, reason, time.perf_counter() - started, trail)

    def not_asked(self, clause: Clause) -> str:
        """Return why a clause does not apply to this subject or on this machine; empty if it does."""
        if is_newer(clause.since, self.runs.as_of):
            return newer(clause.since, self.runs.as_of)
        for need in clause.needs:
            if not self.runs.has(need):
                return f"lacks {need}: {self.runs.lacks[need]}"
        for package in clause.packages:
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed: pip install '{DISTRIBUTION}[{PACKAGES[package]}]'"
        return ""
