"""Judge GPT training stacks by the clauses, and show the clauses and the results."""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conformance.errors import UsageError, sentence
from conformance.options import AUDIT_OPTIONS, FAILED, FORMATS, INTERRUPTED, OPTIONS, USAGE, Parser

if TYPE_CHECKING:
    from conformance.clause import Clause

EXAMPLES = """\
examples:
  python -m conformance run                                  judge the reference trainer
  python -m conformance run --subject litgpt                 judge LitGPT (pip install 'gpt-conformance[litgpt]')
  python -m conformance run --subject my_adapter:Mine        judge your own stack
  python -m conformance run --clause DECAY --clause OPT-7    judge a chapter and a clause
  python -m conformance run --format github                  print annotations for GitHub Actions
  python -m conformance list                                 list all clauses
  python -m conformance explain DECAY-4                      explain a clause or a chapter: why, source, mutants, bound
  python -m conformance report reports/conformance/*.json    turn result files into pages
  python -m conformance audit -- train.py --lr 3e-4          audit a training script, with no line changed
  python -m conformance new-adapter train.py -- --lr 3e-4    write the skeleton of an adapter for that script

exit code: 0 no clause failed, 1 some did, 2 the command line was wrong, 130 interrupted by Ctrl-C
"""


AUDIT_EXAMPLES = """\
examples:
  python -m conformance audit -- train.py --lr 3e-4
  python -m conformance audit --updates 8 --report audit.json -- -m mypackage.train
  python -m conformance audit --expect lr=3e-4,clip=1.0,tied -- train.py
  torchrun --nproc-per-node 8 -m conformance audit -- train.py

exit code: the script's own if it fails, 1 if there is a fault, 2 if the command line was wrong or no update was seen,
otherwise 0
"""


DIFF_EXAMPLES = """\
example, one device against two:
  python -m conformance audit --trace one -- train.py
  torchrun --nproc-per-node 2 -m conformance audit --trace two -- train.py
  python -m conformance diff one two

exit code: 0 the runs are equal within noise, 1 they differ, 2 the command line or a record was wrong
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; for a user's mistake, print one sentence and return 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command: list[str] = []
    if given[:1] in (["audit"], ["new-adapter"]) and "--" in given:  # what follows is the script's own
        place = given.index("--")
        given, command = given[:place], given[place + 1 :]
    options = build_parser().parse_args(given)
    if given[:1] == ["new-adapter"]:
        options.arguments = command
    elif command:
        options.script = command
    try:
        code: int = options.command(options)
        return code
    except BrokenPipeError:  # the reader (head, say) has seen enough; Python's exit must not write either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UsageError as error:
        print(sentence(error), file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:  # what no other message tells, such as a disk that is full
        where = f"{error.filename}: " if error.filename else ""
        print(sentence(UsageError(f"{where}{error.strerror or error}.")), file=sys.stderr)
        return FAILED


def build_parser() -> argparse.ArgumentParser:
    """Return the commands and their options."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = Parser("python -m conformance", description=__doc__, epilog=EXAMPLES, formatter_class=plain)
    commands = parser.add_subparsers(required=True, metavar="run|audit|diff|new-adapter|list|explain|report")

    run = commands.add_parser("run", help="judge a training stack", epilog=EXAMPLES, formatter_class=plain)
    for flag, settings in OPTIONS.items():
        run.add_argument(flag, **settings)
    run.add_argument("--format", choices=FORMATS, default="text", help="what to print (default: text)")
    run.add_argument("--verbose", "-v", action="store_true", help="also print tracebacks")
    run.set_defaults(command=run_command)

    audit = commands.add_parser(
        "audit",
        help="audit any training script, with no line changed",
        description="Run a training script as Python would, watch its first updates, and say what is wrong with them.",
        epilog=AUDIT_EXAMPLES,
        formatter_class=plain,
    )
    for flag, settings in AUDIT_OPTIONS.items():
        audit.add_argument(flag, **settings)
    audit.add_argument(
        "script",
        nargs="*",
        metavar="SCRIPT",
        help="after --: train.py and its arguments, or -m, a module and its arguments",
    )
    audit.set_defaults(command=audit_command)

    diff = commands.add_parser(
        "diff",
        help="name the first place where two audited runs differ",
        description="Compare two records of conformance audit --trace, and name the first place where the runs differ.",
        epilog=DIFF_EXAMPLES,
        formatter_class=plain,
    )
    diff.add_argument("first", type=Path, metavar="A", help="the folder of the first record")
    diff.add_argument("second", type=Path, metavar="B", help="the folder of the second record")
    diff.add_argument(
        "--noise",
        type=Path,
        metavar="FOLDER",
        help="the record of a repeat of the first run: differences as large as theirs count as noise",
    )
    diff.add_argument("--format", choices=("text", "json"), default="text", help="what to print (default: text)")
    diff.set_defaults(command=diff_command)

    new = commands.add_parser(
        "new-adapter",
        help="write the skeleton of an adapter for a training script",
        description="Run a training script until it has made four updates, and write an adapter for it: what was seen "
        "is filled in, and the rest are questions. No file is overwritten.",
        epilog="example:\n  python -m conformance new-adapter train.py -- --lr 3e-4",
        formatter_class=plain,
    )
    new.add_argument("script", metavar="SCRIPT", help="the script; its arguments go after --")
    new.add_argument("--out", metavar="FILE", help="the file to write (default: SCRIPT_adapter.py in this folder)")
    new.set_defaults(command=new_adapter_command)

    listing = commands.add_parser("list", help="list all clauses, with requirement and source")
    listing.add_argument("--format", choices=("text", "json"), default="text", help="what to print (default: text)")
    listing.set_defaults(command=list_command)

    explain = commands.add_parser(
        "explain", help="explain a clause or a chapter: requirement, why, source, mutants, bound"
    )
    explain.add_argument("clause", metavar="CLAUSE", help="an id such as DECAY-4, or a chapter such as DECAY")
    explain.add_argument("--format", choices=("text", "json"), default="text", help="what to print (default: text)")
    explain.set_defaults(command=explain_command)

    report = commands.add_parser(
        "report",
        help="turn result files into pages, a Markdown table and badges",
        description="Turn result files into pages, a Markdown table and badges.\n"
        "If the files hold two releases of a stack, the pages say what the newer one mends and breaks.",
        formatter_class=plain,
        epilog="examples:\n  python -m conformance report conformance.json --out pages\n"
        "  python -m conformance report old.json new.json\n",
    )
    report.add_argument("results", nargs="+", type=Path, metavar="FILE", help="a JSON file that run --report wrote")
    report.add_argument(
        "--kill-matrix", type=Path, metavar="FILE", help="also show this JSON file of nox -s mutants -- --write FILE"
    )
    report.add_argument(
        "--findings",
        type=Path,
        metavar="FOLDER",
        help="also make pages of the findings (*.md) and scripts (*.py) in this folder, which failures then link to; "
        "without it, no page says how a failure was reproduced by hand",
    )
    report.add_argument(
        "--out", type=Path, default=Path("report"), metavar="FOLDER", help="the folder to write to (default: report)"
    )
    report.set_defaults(command=report_command)
    return parser


def run_command(options: argparse.Namespace) -> int:
    """Judge a subject, with progress on stderr and the result on stdout."""
    from rich.console import Console

    from conformance.engine import Sitting
    from conformance.options import Options
    from conformance.progress import shown, waiting
    from conformance.report.result import plain

    errors = Console(file=sys.stderr, highlight=False)  # as stderr is now: inside a recording it is the recorder's
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 100, highlight=False)
    with waiting(f"Loading {plain(options.subject)} and PyTorch", errors):
        sitting = Sitting(Options.of(options))
    with sitting:
        try:
            for clause in shown(sitting.chosen.values(), errors, sitting.named.name):
                sitting.judge(clause)
        except KeyboardInterrupt:
            sitting.finish(console, options.verbose, options.format)
            errors.print("Interrupted: the results above are those of the clauses judged so far.")
            return INTERRUPTED
        return sitting.finish(console, options.verbose, options.format)


def loading(quiet: bool = False) -> AbstractContextManager[None]:
    """Say that PyTorch is being loaded; only on the first rank, and not if the user wants quiet."""
    if quiet or os.environ.get("RANK", "0") != "0":
        return nullcontext()
    from rich.console import Console

    from conformance.progress import waiting

    return waiting("Loading PyTorch", Console(file=sys.stderr, highlight=False))


def audit_command(options: argparse.Namespace) -> int:
    """Audit a script: its output goes where it always goes, the letter to stderr."""
    with loading(quiet=options.quiet):
        from conformance.auditing.command import audit_script

    return audit_script(options)


def new_adapter_command(options: argparse.Namespace) -> int:
    """Write the skeleton of an adapter."""
    with loading():
        from conformance.skeleton.command import new_adapter

    return new_adapter(options)


def diff_command(options: argparse.Namespace) -> int:
    """Name the first place where two runs differ."""
    with loading():
        from conformance.auditing.comparison import compare_records

    return compare_records(options.first, options.second, options.noise, options.format)


def list_command(options: argparse.Namespace) -> int:
    """Print the catalogue."""
    from conformance.catalogue import read_catalogue

    clauses = read_catalogue()
    if options.format == "json":
        print_json([describe(clause) for clause in clauses.values()])
        return 0
    for clause in clauses.values():
        print(f"{clause.id:9}{clause.level:7}{clause.requirement}\n{'':16}{clause.source}")
    return 0


def explain_command(options: argparse.Namespace) -> int:
    """Print all there is to know about a clause, or about each clause of a chapter."""
    from rich.console import Console
    from rich.text import Text

    from conformance.catalogue import read_catalogue
    from conformance.clause import find_clauses

    chosen = find_clauses([options.clause], read_catalogue())
    facts = [describe(clause) | {"mutants": mutants_of(clause.id)} for clause in chosen.values()]
    if options.format == "json":
        print_json(facts[0] if len(facts) == 1 else facts)
        return 0
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    titles = {"why": "Why it matters", "mend": "How to mend it", "source": "Seen before", "bound": "Bound"}
    titles |= {"since": "Since", "part": "Part"}
    for clause, known in zip(chosen.values(), facts, strict=True):
        console.print(Text(f"{clause.id} ({clause.level})  {clause.requirement}", style="bold"))
        for key, title in titles.items():
            console.print(Text(f"{title}: ", style="dim").append(str(known[key]), style="default not dim"))
        needs = ", ".join((*clause.needs, *clause.packages)) or "nothing"
        console.print(Text("Needs: ", style="dim").append(needs, style="default not dim"))
        console.print(Text("Planted faults (mutants) that must break it:", style="dim"))
        for mutant in known["mutants"]:
            console.print(Text(f"  {mutant['mutant']}  ").append(mutant["published"], style="dim"))
            for line in mutant["diff"]:
                console.print(Text(f"    {line}", style="dim"), soft_wrap=True)
        if len(facts) > 1:
            console.print()
    return 0


def print_json(content: Any) -> None:
    """Print plain data as JSON."""
    import json

    print(json.dumps(content, indent=2, ensure_ascii=False))


def describe(clause: "Clause") -> dict[str, Any]:
    """Return a clause as plain data."""
    names = ("id", "level", "requirement", "why", "mend", "source", "bound", "needs", "packages", "since", "part")
    return {name: getattr(clause, name) for name in names}


def mutants_of(identity: str) -> list[dict[str, Any]]:
    """Return the planted faults that name a clause, from the kill matrix that comes with the package."""
    from conformance.report.result import read_json

    here = Path(__file__).parent
    for path in (here / "kill-matrix.json", here.parent / "reports" / "kill-matrix.json"):  # installed; in a checkout
        if path.is_file():
            rows = read_json(path, "kill matrix")["mutants"]
            return [row for row in rows if identity in row["named"]]
    return []


def report_command(options: argparse.Namespace) -> int:
    """Render the pages."""
    from rich.console import Console

    from conformance.progress import waiting
    from conformance.report.findings import read_findings
    from conformance.report.page import read_columns, read_kill_matrix, render
    from conformance.report.result import plain

    with waiting("Rendering the pages", Console(file=sys.stderr, highlight=False)):
        kill_matrix = read_kill_matrix(options.kill_matrix) if options.kill_matrix else None
        findings = read_findings(options.findings) if options.findings else []
        first, *others = render(read_columns(options.results), kill_matrix, options.out, findings)
    print(plain(f"Written: {options.out / first}, and beside it {', '.join(others)}"))
    if not findings:
        print("No page tells how a failure was reproduced by hand: --findings FOLDER adds such pages.")
    return 0
