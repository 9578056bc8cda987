"""The command line: ``python -m conformance run|list|explain|report``."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conformance.clause import Clause, catalogue, find_clauses
from conformance.deviations import load_deviations
from conformance.report.letter import as_json, check_writable, print_letter, repeat_command, write_json
from conformance.session import BAD, Result, Session
from conformance.subject import UsageError, load_subject

EXAMPLES = """\
examples:
  python -m conformance run                                  judge the reference trainer
  python -m conformance run --subject litgpt                 judge LitGPT (pip install 'gpt-conformance[litgpt]')
  python -m conformance run --subject my_adapter:Mine        judge your own stack
  python -m conformance run --clause DECAY --clause OPT-7    judge a chapter and a clause
  python -m conformance run --format github                  annotations in GitHub Actions
  python -m conformance list                                 all clauses
  python -m conformance explain DECAY-4                      one clause: why, source, mutants, bound
  python -m conformance report reports/conformance/*.json    result files -> one page

exit code: 0 no clause failed, 1 some did, 2 the command line was wrong
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code. A mistake of the user's is one sentence on stderr and 2."""
    options = build_parser().parse_args(arguments)
    try:
        code: int = options.command(options)
        return code
    except BrokenPipeError:  # the reader (head, say) has seen enough; Python's exit must not write either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UsageError as error:
        print(f"{str(error)[:1].upper()}{str(error)[1:]}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m conformance", description=__doc__, epilog=EXAMPLES, formatter_class=plain
    )
    commands = parser.add_subparsers(required=True, metavar="run|list|explain|report")

    run = commands.add_parser("run", help="judge a training stack", epilog=EXAMPLES, formatter_class=plain)
    run.add_argument(
        "--subject", default="reference", metavar="NAME", help="reference, litgpt, ... or module:Attribute"
    )
    run.add_argument(
        "--clause", action="append", default=[], metavar="ID", help="only this clause or chapter; repeatable"
    )
    run.add_argument("--deviations", type=Path, metavar="FILE", help="TOML file of clauses that are broken knowingly")
    run.add_argument("--report", type=Path, metavar="FILE", help="write the results as JSON")
    run.add_argument("--format", choices=("text", "json", "github"), default="text", help="what to print")
    run.add_argument("--verbose", "-v", action="store_true", help="with tracebacks")
    run.set_defaults(command=run_command)

    listing = commands.add_parser("list", help="all clauses, with requirement and source")
    listing.add_argument("--format", choices=("text", "json"), default="text", help="what to print")
    listing.set_defaults(command=list_command)

    explain = commands.add_parser("explain", help="one clause: requirement, why, source, mutants, bound")
    explain.add_argument("clause", metavar="CLAUSE-ID")
    explain.add_argument("--format", choices=("text", "json"), default="text", help="what to print")
    explain.set_defaults(command=explain_command)

    report = commands.add_parser("report", help="turn result files into one page, a Markdown table and badges")
    report.add_argument("results", nargs="+", type=Path, metavar="FILE", help="JSON written by --report")
    report.add_argument("--kill-matrix", type=Path, metavar="FILE", help="JSON written by nox -s mutants -- --write")
    report.add_argument("--out", type=Path, default=Path("report"), metavar="FOLDER", help="default: report")
    report.set_defaults(command=report_command)
    return parser


def run_command(options: argparse.Namespace) -> int:
    """Judge a subject, with progress on stderr and the result on stdout."""
    from rich.console import Console
    from rich.progress import track

    if options.report is not None:
        check_writable(options.report)
    everything, chosen = catalogue(), find_clauses(options.clause)
    deviations = load_deviations(options.deviations, everything) if options.deviations else {}
    errors = Console(file=sys.stderr)  # as it is now: inside a recording it is the recorder's
    with Session(load_subject(options.subject), deviations) as session:
        progress = track(chosen.values(), f"Judging {session.subject.name}", console=errors, transient=True)
        results = [session.judge(clause) for clause in progress]
        subject = session.subject
    partial = set(chosen) != set(everything)
    report = as_json(subject, options.subject, results, partial)
    if options.report is not None:
        write_json(options.report, report)
    if options.format == "json":
        print(json.dumps(report, indent=2, ensure_ascii=False))
    elif options.format == "github":
        print_annotations(options.subject, results)
    else:
        width = None if sys.stdout.isatty() else 100
        print_letter(Console(width=width, highlight=False), subject, options.subject, results, partial, options.verbose)
    return int(any(result.outcome in BAD for result in results))


def print_annotations(spec: str, results: Sequence[Result]) -> None:
    """Workflow commands of GitHub Actions, one for each clause that did not pass."""
    for result in results:
        if result.outcome in (*BAD, "deviates"):
            kind = "error" if result.outcome in BAD and result.clause.level == "must" else "warning"
            lines = [result.clause.requirement, f"expected: {result.expected}", f"seen: {result.seen}", result.reason]
            lines += [f"mend: {result.clause.mend}", f"repeat: {repeat_command(spec, result)}"]
            message = "\n".join(line for line in lines if line and not line.endswith(": "))
            print(f"::{kind} title={result.clause.id} {result.outcome}::{escape_annotation(message)}")
    print(", ".join(f"{sum(r.outcome == o for r in results)} {o}" for o in dict.fromkeys(r.outcome for r in results)))


def escape_annotation(text: str) -> str:
    """Text as a workflow command takes it: in one line."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def list_command(options: argparse.Namespace) -> int:
    """Print the catalogue."""
    clauses = catalogue()
    if options.format == "json":
        print(json.dumps([describe(clause) for clause in clauses.values()], indent=2, ensure_ascii=False))
        return 0
    for clause in clauses.values():
        print(f"{clause.id:9}{clause.level:7}{clause.requirement}\n{'':16}{clause.source}")
    return 0


def explain_command(options: argparse.Namespace) -> int:
    """Print all there is to know about one clause."""
    from rich.console import Console
    from rich.text import Text

    chosen = find_clauses([options.clause])
    if len(chosen) != 1:
        raise UsageError(f"{options.clause} is a chapter of {len(chosen)} clauses: give one of {', '.join(chosen)}.")
    (clause,) = chosen.values()
    facts = describe(clause) | {"mutants": mutants_of(clause.id)}
    if options.format == "json":
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return 0
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    console.print(Text(f"{clause.id} ({clause.level})  {clause.requirement}", style="bold"))
    titles = {"why": "Why it matters", "mend": "How to mend it", "source": "Seen before", "bound": "Bound"}
    for key, title in titles.items():
        console.print(Text(f"{title}: ", style="dim").append(str(facts[key]), style="default"))
    console.print(Text("Needs: ", style="dim").append(", ".join(clause.needs) or "nothing", style="default"))
    console.print(Text("Mutants that it kills:", style="dim"))
    for mutant in facts["mutants"]:
        console.print(f"  {mutant['mutant']}  [dim]{mutant['published']}[/]", markup=True)
        for line in mutant["diff"]:
            console.print(Text(f"    {line}", style="dim"), soft_wrap=True)
    return 0


def describe(clause: Clause) -> dict[str, Any]:
    """A clause as plain data."""
    names = ("id", "level", "requirement", "why", "mend", "source", "bound", "needs")
    return {name: getattr(clause, name) for name in names}


def mutants_of(identity: str) -> list[dict[str, Any]]:
    """The planted faults that name a clause, from the kill matrix that comes with the package."""
    here = Path(__file__).parent
    for path in (here / "kill-matrix.json", here.parent / "reports" / "kill-matrix.json"):  # installed; in a checkout
        if path.is_file():
            rows = json.loads(path.read_text(encoding="utf-8"))["mutants"]
            return [row for row in rows if identity in row["named"]]
    return []


def report_command(options: argparse.Namespace) -> int:
    """Render the page."""
    from conformance.report.page import read_kill_matrix, read_results, render

    kill_matrix = read_kill_matrix(options.kill_matrix) if options.kill_matrix else None
    render(read_results(options.results), kill_matrix, options.out)
    print(f"Written: {options.out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
