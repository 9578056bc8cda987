"""The options of both doors: the command line and pytest."""

import argparse
import difflib
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from conformance.errors import UsageError, one_line

Format = Literal["text", "json", "github"]
PASSED, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
"""Exit codes: no clause failed; some did; the command line was wrong; Ctrl-C, as shells have it."""

OPTIONS: dict[str, dict[str, Any]] = {
    "--subject": {
        "metavar": "NAME",
        "default": "reference",
        "help": "the stack to judge: reference, litgpt, ..., or module:Attribute of an adapter (default: reference)",
    },
    "--clause": {
        "metavar": "ID",
        "action": "append",
        "default": [],
        "help": "judge only this clause or chapter; may be repeated",
    },
    "--deviations": {
        "metavar": "FILE",
        "help": "a TOML file of the clauses that the stack is known to break, with reasons",
    },
    "--report": {"metavar": "FILE", "help": "write the results as JSON, and update the file after every clause"},
    "--timeout": {
        "metavar": "SECONDS",
        "default": "120",
        "help": "stop a training run that takes longer, and report an error (default: 120)",
    },
}
"""Options of both doors, as argparse and pytest take them."""
AUDIT_OPTIONS: dict[str, dict[str, Any]] = {
    "--updates": {"metavar": "N", "default": "4", "help": "how many updates to watch (default: 4)"},
    "--then": {
        "choices": ("stop", "go-on"),
        "default": "stop",
        "help": "after these updates, end the run, or let it go on unwatched (default: stop)",
    },
    "--expect": {
        "metavar": "WORDS",
        "default": "",
        "help": "what you expect; a run that differs has a fault: lr=3e-4,clip=1.0,tied,fresh,seed=1,"
        "no-weight-decay='norm|bias'",
    },
    "--allow": {
        "metavar": "RULE=REASON",
        "action": "append",
        "default": [],
        "help": "do not count what this rule finds, for the reason you give; may be repeated",
    },
    "--report": {"metavar": "FILE", "help": "write the verdict as JSON"},
    "--page": {
        "metavar": "FILE",
        "help": "write the verdict as an HTML page, with curves of the updates and tables of tensors",
    },
    "--format": {
        "choices": ("text", "json", "github"),
        "default": "text",
        "help": "how to print the verdict on stderr (default: text)",
    },
    "--trace": {"metavar": "FOLDER", "help": "write the record of the run into this folder, for conformance diff"},
    "--resume-with": {
        "metavar": "COMMAND",
        "help": "then run this command, which resumes from the checkpoint that the script left, and judge the resume",
    },
    "--quiet": {
        "action": "store_true",
        "help": "do not print the verdict: for --report, --trace and the exit code only",
    },
    "--strict": {"action": "store_true", "help": "count advice as a fault: it makes the exit code 1"},
}
"""Options of the audit, as argparse takes them."""
FORMATS: tuple[Format, ...] = get_args(Format)


class Parser(argparse.ArgumentParser):
    """argparse's parser, whose errors name the nearest option and have a bounded length, whatever was typed."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and what is wrong with the command line, and exit."""
        self.print_usage(sys.stderr)
        typed = message.partition("unrecognized arguments: ")[2].partition(" ")[0].partition("=")[0]
        known = commands_of(self)
        near = difflib.get_close_matches(typed, known, n=1) if typed.startswith("--") else []
        hint = f"; did you mean {near[0]}?" if near else ""
        if typed in known:
            hint = f"; {typed} is an option of {' and '.join(known[typed])}."
        self.exit(USAGE, f"{one_line(f'{self.prog}: error: {message}{hint}')}\n")


def commands_of(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """Return for each long option of a parser and of its commands which of them take it."""
    found: dict[str, list[str]] = {}
    for action in parser._actions:  # there is no public list of them
        for name in action.option_strings:
            if name.startswith("--"):
                found.setdefault(name, []).append(parser.prog)
        if isinstance(action, argparse._SubParsersAction):
            for command in dict.fromkeys(action.choices.values()):
                for name, takers in commands_of(command).items():
                    found.setdefault(name, []).extend(takers)
    return found


@dataclass(frozen=True)
class Options:
    """What a user asked for."""

    subject: str = "reference"
    clauses: tuple[str, ...] = ()
    deviations: Path | None = None
    report: Path | None = None
    timeout: float = 120.0

    @classmethod
    def of(cls, given: Any) -> "Options":
        """Return the options in a namespace that argparse or pytest has filled from ``OPTIONS``."""
        deviations, report = (Path(name) if name else None for name in (given.deviations, given.report))
        try:
            timeout = float(given.timeout)
        except ValueError:
            timeout = math.nan
        if not 0 < timeout < math.inf:
            raise UsageError(f"--timeout is {given.timeout!r}: give a number of seconds above 0.")
        return cls(given.subject, tuple(given.clause), deviations, report, timeout)
