"""Annotations for GitHub Actions: one line for each clause that did not pass."""

from collections.abc import Iterator, Mapping

from conformance.clause import Clause
from conformance.report.result import Report, repeat_command
from conformance.session import BAD


def annotations(report: Report, clauses: Mapping[str, Clause]) -> Iterator[str]:
    """Yield workflow commands, and at last a line that counts the outcomes."""
    for verdict in report.verdicts.values():
        if verdict.outcome not in (*BAD, "deviates"):
            continue
        kind = "error" if verdict.outcome in BAD and verdict.level == "must" else "warning"
        clause = clauses.get(verdict.id)
        facts = {"expected": verdict.expected, "seen": verdict.seen, "": verdict.reason}
        facts |= {"mend": clause.mend if clause else "", "repeat": repeat_command(report.spec, verdict.id)}
        lines = [verdict.requirement, *(f"{label}: {text}".removeprefix(": ") for label, text in facts.items() if text)]
        yield f"::{kind} title={verdict.id} {verdict.outcome}::{escaped(chr(10).join(lines))}"
    yield ", ".join(f"{number} {outcome}" for outcome, number in report.summary().items() if number)


def escaped(text: str) -> str:
    """Return text as a workflow command takes it: in one line."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
