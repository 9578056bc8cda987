"""The command ``python -m conformance audit``: its options, the run, and the exit code."""

import argparse
import importlib.util
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TextIO

from conformance.auditing.facts import Facts
from conformance.auditing.judging import allowances, judge_resumed, with_allowances
from conformance.auditing.page import write_page
from conformance.auditing.processes import place
from conformance.auditing.rules.expected import parse
from conformance.auditing.run import audited, run_script
from conformance.auditing.traces import load, save
from conformance.auditing.verdict import Verdict, annotations, as_json, print_letter
from conformance.errors import UsageError
from conformance.options import FAILED, PASSED, USAGE
from conformance.reading import make_folder
from conformance.report.result import plain, require_writable, write_json
from conformance.scripts import parsed

NOTHING_SEEN = """\
The audit saw no update: the script ended before an optimizer stepped, it trains in a process that it starts itself, or
it moves its weights without an optimizer that has param_groups and step().
Give the script arguments with which it trains. To audit several processes, start them with torchrun:
torchrun --nproc-per-node 2 -m conformance audit -- train.py"""
COMPILED = """\
The audit saw no update: the script calls compiled code, and the audit does not look inside it. If backward or step are
compiled, set TORCHDYNAMO_DISABLE=1 in the environment: the script then trains as it is written, and is audited so."""


def audit_script(options: argparse.Namespace) -> int:
    """Audit a script and return the exit code. Raises UsageError for a user's mistake."""
    updates = whole_number(options.updates)
    expected, allowed = parse(options.expect), allowances(options.allow)
    command = check_command(options.script)
    stderr = sys.stderr  # as it is now: the run's own goes through the audit's ears
    report = require_writable(Path(options.report)) if options.report else None
    page = require_writable(Path(options.page)) if options.page else None
    folder = check_folder(options.trace)

    def done(verdict: Verdict) -> None:
        if verdict.broken or (verdict.facts is not None and verdict.facts.updates):
            if not options.quiet:
                show(verdict, options.format, stderr)
            write(verdict)

    def write(verdict: Verdict) -> None:
        if report is not None:
            print(plain(f"Written: {write_json(report, verdict.as_json())}"), file=stderr)
        if page is not None:
            write_page(verdict, page)
            print(plain(f"Written: {page}"), file=stderr)

    if not options.quiet and place()[0] == 0:
        count = f"{updates} update{'s' * (updates != 1)}"
        print(plain(f"Auditing {shlex.join(command)}: watching {count}."), file=stderr, flush=True)
    second = check_command(resume_command(options.resume_with)) if options.resume_with else None
    start = partial(audited, updates, options.then, expected, allowed, options.strict, done)
    code, verdict = run_script(command, start)
    if folder is not None and verdict.facts is not None:
        saved = save(verdict.facts, folder)
        if not options.quiet:
            print(plain(f"Written: {saved}"), file=stderr)
    if code:
        return code
    if verdict.facts is None or (not verdict.facts.updates and not verdict.broken):
        print(COMPILED if verdict.facts is not None and verdict.facts.compiled else NOTHING_SEEN, file=stderr)
        return USAGE
    if second is not None:
        findings = with_allowances(judge_resumed(verdict.facts, resumed(second, updates)), allowed)
        verdict.findings += findings
        if not options.quiet:
            show(replace(verdict, findings=findings), options.format, stderr)
        write(verdict)
    return FAILED if verdict.failed else PASSED


def resume_command(text: str) -> list[str]:
    """Return the command that resumes, without the ``python`` that it may begin with."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"--resume-with is not a valid command: {str(error).lower()}.") from None
    return words[1:] if words and Path(words[0]).name.startswith("python") else words


def resumed(command: list[str], updates: int) -> Facts:
    """Run the command that resumes, audited in a process of its own, and return its facts.

    Raises:
        UsageError: if it made no update.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "conformance", "audit", "--updates", str(updates), "--trace", folder, "--quiet"]
        ended = subprocess.run([*words, "--", *command], check=False)
        try:
            return load(Path(folder))[0]
        except UsageError:
            raise UsageError(
                f"the command of --resume-with left no record and ended with exit code {ended.returncode}: "
                "run it by itself to see why."
            ) from None


def show(verdict: Verdict, form: str, stream: TextIO) -> None:
    """Print the verdict."""
    from rich.console import Console

    if form == "json":
        print(as_json(verdict), file=stream)
    elif form == "github":
        for line in annotations(verdict):
            print(line, file=stream)
    else:
        print_letter(Console(file=stream, width=None if stream.isatty() else 100, highlight=False), verdict)
    stream.flush()


def whole_number(text: str) -> int:
    """Return the number of updates."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if not 0 < number <= 1000:
        raise UsageError(f"--updates is {text!r}: give a whole number from 1 to 1000.")
    return number


def check_command(command: list[str]) -> list[str]:
    """Return the script and its arguments. Raises UsageError if there is no such script."""
    if not command:
        raise UsageError("no script to audit: name it after --, as in python -m conformance audit -- train.py args ...")
    if command[0] == "-m":
        if len(command) < 2:
            raise UsageError(
                "-m needs the name of a module, as in python -m conformance audit -- -m package.train args ..."
            )
        sys.path.insert(0, os.getcwd())
        try:
            found = importlib.util.find_spec(command[1])
            if found is not None and found.submodule_search_locations is not None:  # a package, which needs a main
                found = importlib.util.find_spec(f"{command[1]}.__main__")
        except (ImportError, ValueError):
            found = None
        finally:
            sys.path.pop(0)
        if found is None:
            raise UsageError(
                f"no module named {command[1]!r} that can be run, in this environment or folder: check its name."
            )
        return command
    if command[0].startswith("python") and not Path(command[0]).exists():
        raise UsageError(
            "leave python out: the audit runs the script itself, as in python -m conformance audit -- train.py ..."
        )
    if not Path(command[0]).is_file():
        raise UsageError(
            f"no such script: {command[0]}. Give the path of a Python file, or -m and the name of a module."
        )
    if Path(command[0]).suffix == ".py":  # Python also runs archives
        parsed(Path(command[0]))
    return command


def check_folder(name: str | None) -> Path | None:
    """Return the folder for the trace, made if it is not there, wherever the script goes from here."""
    return make_folder(Path(name), "--trace").absolute() if name else None
