"""The result as a doctor's letter: what was checked, what is wrong, why it matters, how to mend it."""

from collections import Counter
from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from conformance.capabilities import CAPABILITIES
from conformance.causes import explained_by, in_order_of_cause
from conformance.clause import CHAPTERS, Clause, chapter_and_number
from conformance.errors import REFUSED
from conformance.report.result import Report, Verdict, repeat_command
from conformance.report.wrapping import print_wrapped
from conformance.session import OUTCOMES
from conformance.version import DISTRIBUTION

STYLES = {
    "pass": "green",
    "fail": "bold red",
    "deviates": "yellow",
    "fixed": "bold red",
    "n/a": "dim",
    "error": "bold magenta",
}
TOLD = ("fail", "fixed", "error", "deviates")
"""Outcomes that are told one by one."""


def print_letter(console: Console, report: Report, clauses: Mapping[str, Clause], verbose: bool = False) -> None:
    """Print the letter. All that comes from the stack is printed as text, never as markup.

    Args:
        console: to print to.
        report: what was found.
        clauses: the catalogue.
        verbose: with tracebacks.
    """
    facts = report.environment
    console.print()
    count = len(report.verdicts)
    console.print(
        Text(f"{report.name} {report.version}", style="bold").append(
            f", judged by {count} clause{'s' * (count != 1)}", style="not bold"
        )
    )
    machine = f"{DISTRIBUTION} {facts[DISTRIBUTION]}, Python {facts['python']}, torch {facts['torch']}, "
    machine += f"{facts['processor']}, {facts['cores']} cores, GPU: {facts['gpu']}"
    console.print(Text(machine, style="dim"), soft_wrap=True)
    for part, title in (("core", "chapter"), ("extension", "extensions")):
        rows = [verdict for verdict in report.verdicts.values() if verdict.part == part]
        if rows:
            console.print(tally(title, rows))
    told = [verdict.id for verdict in report.verdicts.values() if verdict.outcome in TOLD]
    same = alike(report)
    for identity in in_order_of_cause(told):
        if identity not in same:
            print_finding(console, report, report.verdicts[identity], clauses.get(identity), verbose)
        elif same[identity][0] == identity:
            print_alike(console, report, same[identity], verbose)
    print_reasons(console, report)
    total = Text("\nResult: ", style="bold")
    for number, (outcome, found) in enumerate((o, n) for o, n in report.summary().items() if n):
        total.append(", " if number else "", style="not bold").append(f"{found} {outcome}", style=STYLES[outcome])
    seconds = sum(verdict.seconds for verdict in report.verdicts.values())
    console.print(total.append(f", {seconds:.1f} s", style="not bold"))
    for line in advice(report, clauses):
        console.print(Text(line, "yellow"))
    if report.partial:
        console.print(
            Text("Partial: not all clauses were judged, so this is not a result for the stack as a whole.", "yellow")
        )


def tally(title: str, verdicts: list[Verdict]) -> Table:
    """Return a table of how many clauses of each chapter have each outcome."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(title, no_wrap=True, min_width=38)
    for outcome in OUTCOMES:
        table.add_column(outcome, justify="right")
    for chapter, words in CHAPTERS.items():
        found = [verdict.outcome for verdict in verdicts if chapter_and_number(verdict.id)[0] == chapter]
        if found:
            counts = [(outcome, found.count(outcome)) for outcome in OUTCOMES]
            cells = [Text(str(n), STYLES[outcome]) if n else Text("·", "dim") for outcome, n in counts]
            table.add_row(f"{chapter:6}  {words}", *cells)
    return table


def print_finding(console: Console, report: Report, verdict: Verdict, clause: Clause | None, verbose: bool) -> None:
    """Print one clause that did not pass."""
    head = Text(f"{verdict.outcome.upper()} {verdict.id}", style=STYLES[verdict.outcome])
    console.print()
    print_wrapped(console, head.append("  ").append(verdict.requirement, style="bold not dim"), hang=2)
    failed, erred = verdict.outcome == "fail", verdict.outcome == "error"
    causes = explained_by(verdict.id, [other.id for other in report.verdicts.values() if other.outcome == "fail"])
    lines = [
        ("Expected", verdict.expected),
        ("Seen", verdict.seen),
        ("Reason", verdict.reason),
        ("May follow from", f"{', '.join(causes)}: mend that first" if causes else ""),
        ("Why it matters", clause.why if clause and not erred else ""),
        ("How to mend it", clause.mend if clause and failed else ""),
        ("Seen before", clause.source if clause and failed else ""),
    ]
    for label, text in lines:
        if text:
            line = Text(f"{label}: ", style="dim").append(text, style="default not dim")
            print_wrapped(console, line, indent=2)
    # In one piece, to be copied.
    repeat = Text("  Repeat: ", style="dim").append(repeat_command(report.spec, verdict.id), style="not dim")
    console.print(repeat, soft_wrap=True)
    if verbose and verdict.traceback:
        console.print(Text(verdict.traceback, style="dim"))


def alike(report: Report) -> dict[str, list[str]]:
    """Return the clauses that ended with the same error, for each of them, where there are more than two."""
    by_reason: dict[str, list[str]] = {}
    for verdict in report.verdicts.values():
        if verdict.outcome == "error":
            by_reason.setdefault(verdict.reason, []).append(verdict.id)
    return {identity: ids for ids in by_reason.values() if len(ids) > 2 for identity in ids}


def print_alike(console: Console, report: Report, ids: list[str], verbose: bool) -> None:
    """Print an error that kept several clauses from a verdict, once."""
    first = report.verdicts[ids[0]]
    console.print(Text(f"\nERROR in {len(ids)} clauses", style=STYLES["error"]).append("  all with the same reason"))
    for label, text in (("Reason", first.reason), ("Clauses", ", ".join(ids))):
        print_wrapped(console, Text(f"{label}: ", style="dim").append(text, style="default not dim"), indent=2)
    repeat = Text("  Repeat: ", style="dim").append(repeat_command(report.spec, first.id), style="not dim")
    console.print(repeat, soft_wrap=True)
    if verbose and first.traceback:
        console.print(Text(first.traceback, style="dim"))


def advice(report: Report, clauses: Mapping[str, Clause]) -> Iterator[str]:
    """Yield what to do about a result that says more about the adapter than about the stack."""
    verdicts = report.verdicts.values()
    if verdicts and all(verdict.outcome == "n/a" for verdict in verdicts):
        reasons = Counter(
            verdict.reason.removeprefix(REFUSED) for verdict in verdicts if not verdict.reason.startswith("lacks ")
        )
        why = f": {reasons.most_common(1)[0][0]}" if reasons else ", because the adapter lacks what the clauses need"
        yield f"Nothing was judged{why.rstrip('.')}" + ("" if why.endswith("?") else ".")
    outcomes = {verdict.id: verdict.outcome for verdict in verdicts if verdict.outcome in ("pass", "fail")}
    for capability in CAPABILITIES:
        needing = [i for i in outcomes if i in clauses and capability in clauses[i].needs]
        if len(needing) > 2 and all(outcomes[i] == "fail" for i in needing):
            yield (
                f"Every clause that needs {capability} fails ({', '.join(needing)}): if the stack has no such option, "
                f"name {capability} in the adapter's lacks."
            )


def print_reasons(console: Console, report: Report) -> None:
    """Print why clauses do not apply, each reason once."""
    reasons: dict[str, list[str]] = {}
    for verdict in report.verdicts.values():
        if verdict.outcome == "n/a":
            reasons.setdefault(verdict.reason, []).append(verdict.id)
    if reasons:
        console.print(Text("\nNot applicable", style="bold"))
    for reason, ids in reasons.items():
        print_wrapped(console, Text(f"{', '.join(ids)}: {reason}", style="dim"), indent=2)
