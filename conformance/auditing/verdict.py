"""What an audit found, and how it is printed: as a letter, as annotations, and as JSON."""

import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from conformance.auditing.facts import Facts
from conformance.auditing.rule import TOPICS
from conformance.report.github import escaped
from conformance.report.wrapping import print_wrapped

SIGNS = {"fault": "✗", "advice": "!", "allowed": "-", "ok": "✓", "not looked at": "?"}
STYLES = {"fault": "bold red", "advice": "yellow", "allowed": "dim", "ok": "green", "not looked at": "dim"}
Outcome = Literal["fault", "advice", "allowed", "ok", "not looked at"]
OUTCOMES: tuple[Outcome, ...] = ("fault", "advice", "allowed", "ok", "not looked at")
SCHEMA = 1


@dataclass(frozen=True)
class Finding:
    """What one rule found."""

    rule: str
    topic: str
    requirement: str
    outcome: Outcome
    expected: str = ""
    seen: str = ""
    reason: str = ""
    why: str = ""
    mend: str = ""
    source: str = ""
    processes: tuple[int, ...] = ()
    """Ranks on which it was found; empty in a run of one process."""


@dataclass
class Verdict:
    """What an audit found. It is filled when the recorded updates are done."""

    findings: list[Finding] = field(default_factory=list)
    facts: Facts | None = None
    """Of this process."""
    ranks: list[Facts] = field(default_factory=list)
    broken: str = ""
    """A traceback, if the audit itself failed."""
    strict: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    def of(self, *outcomes: Outcome) -> list[Finding]:
        """Return the findings with these outcomes."""
        return [finding for finding in self.findings if finding.outcome in outcomes]

    @property
    def faults(self) -> list[Finding]:
        """What is certainly wrong."""
        return self.of("fault")

    @property
    def advice(self) -> list[Finding]:
        """What is usually wrong, but may be meant."""
        return self.of("advice")

    @property
    def failed(self) -> bool:
        """Whether the exit code is 1."""
        return bool(self.faults or self.broken or (self.strict and self.advice))

    def __str__(self) -> str:
        """Return the letter as plain text."""
        return as_text(self)

    def as_json(self) -> dict[str, Any]:
        """Return the verdict as plain data."""
        facts = self.facts or Facts()
        counts = {outcome: len(self.of(outcome)) for outcome in OUTCOMES}
        return {
            "schema": SCHEMA,
            "kind": "audit",
            "environment": dict(self.environment),
            "updates": len(facts.updates),
            "processes": max(len(self.ranks), 1),
            "compiled": facts.compiled,
            "summary": counts,
            "broken": self.broken,
            "findings": [{**vars(finding), "processes": list(finding.processes)} for finding in self.findings],
        }


def print_letter(console: Console, verdict: Verdict) -> None:
    """Print the letter. All that comes from the run is printed as text, never as markup."""
    console.print()
    console.print(Text("Audit", style="bold").append(f" of {subject(verdict)}", style="not bold"))
    if verdict.broken:
        console.print(
            Text("The audit itself failed, and checked nothing after that. Please report this:", style="bold magenta")
        )
        console.print(Text(verdict.broken, style="dim"))
    facts = verdict.facts
    if facts is not None and facts.compiled:
        words = "The audit did not look inside compiled code, so that nothing was compiled a second time."
        console.print(Text(words, style="dim"))
    for finding in verdict.of("fault", "advice", "allowed"):
        print_finding(console, finding)
    console.print()
    for topic, words in TOPICS.items():
        print_topic(console, words, [finding for finding in verdict.findings if finding.topic == topic])
    unseen: dict[str, list[str]] = {}
    for finding in verdict.of("not looked at"):
        unseen.setdefault(finding.reason, []).append(finding.rule)
    if unseen:
        console.print(Text("\nNot looked at", style="bold"))
    for reason, names in unseen.items():
        print_wrapped(console, Text(f"{', '.join(names)}: {reason}", style="dim"), indent=2)
    total = Text("\nResult: ", style="bold")
    counted = [(outcome, len(verdict.of(outcome))) for outcome in OUTCOMES]
    for number, (outcome, count) in enumerate((outcome, count) for outcome, count in counted if count):
        plural = "s" if count != 1 and outcome == "fault" else ""
        total.append(", " if number else "", style="not bold").append(f"{count} {outcome}{plural}", STYLES[outcome])
    console.print(total)


def subject(verdict: Verdict) -> str:
    """Return in words what the audit watched."""
    facts = verdict.facts
    if facts is None:
        return "a run that ended before its record was complete"
    count, processes = len(facts.updates), max(len(verdict.ranks), 1)
    words = f"{count} update{'s' * (count != 1)}"
    words += f" on {processes} processes" if processes > 1 else ""
    optimizers = {step.optimizer[0].rpartition(".")[2] for u in facts.updates for step in u.steps if step.optimizer}
    size = sum(math.prod(info.shape) for info in facts.trace.tensors.values())
    if size:
        weights = f"{size / 1e6:,.1f} million" if size >= 1e5 else f"{size:,}"
        words += f": {weights} weights in {len(facts.trace.tensors)} tensors"
    return f"{words}, {' and '.join(sorted(optimizers))}" if optimizers else words


def print_topic(console: Console, words: str, findings: list[Finding]) -> None:
    """Print one line on a topic: its rules, each with a sign."""
    if not findings:
        return
    line = Text(f"{words}: ", style="dim")
    for number, finding in enumerate(findings):
        line.append(", " if number else "", style="not dim")
        line.append(SIGNS[finding.outcome] + finding.rule, style=f"{STYLES[finding.outcome]} not bold")
    print_wrapped(console, line, hang=2)


def print_finding(console: Console, finding: Finding) -> None:
    """Print one finding."""
    console.print()
    where = f" (process {', '.join(map(str, finding.processes))})" if finding.processes else ""
    head = Text(f"{finding.outcome.upper()} {finding.rule}{where}  ", style=STYLES[finding.outcome])
    print_wrapped(console, head.append(finding.requirement, style="bold not dim"), hang=2)
    lines = [
        ("Expected", finding.expected),
        ("Seen", finding.seen),
        ("Allowed", finding.reason),
        ("Why it matters", finding.why if finding.outcome != "allowed" else ""),
        ("How to mend it", finding.mend if finding.outcome != "allowed" else ""),
        ("Seen before", finding.source if finding.outcome != "allowed" else ""),
    ]
    for label, text in lines:
        if text:
            line = Text(f"{label}: ", style="dim").append(text, style="default not dim")
            print_wrapped(console, line, indent=2)


def as_text(verdict: Verdict) -> str:
    """Return the letter without colours."""
    stream = io.StringIO()
    print_letter(Console(file=stream, width=100, highlight=False), verdict)
    return stream.getvalue()


def annotations(verdict: Verdict) -> Iterator[str]:
    """Yield workflow commands for GitHub Actions, and a last line that counts the outcomes."""
    for finding in verdict.of("fault", "advice"):
        kind = "error" if finding.outcome == "fault" else "warning"
        lines = [finding.requirement, f"expected: {finding.expected}", f"seen: {finding.seen}", f"mend: {finding.mend}"]
        yield f"::{kind} title={finding.rule} {finding.outcome}::{escaped(chr(10).join(lines))}"
    yield ", ".join(f"{count} {outcome}" for outcome in OUTCOMES if (count := len(verdict.of(outcome))))


def as_json(verdict: Verdict) -> str:
    """Return the verdict as JSON, with characters beyond ASCII as escapes."""
    return json.dumps(verdict.as_json(), indent=2)
