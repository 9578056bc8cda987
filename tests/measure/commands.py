"""How long the README's commands take where the environment is already there, and how fast --help answers.

``python -m tests.measure.commands --write reports/commands-cpu.json``, on a machine that does nothing else; a quarter
of an hour on two cores, most of it for the kill matrix. Needs nox and the extra ``litgpt`` in the environment.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from conformance.report.environment import environment

ROOT = Path(__file__).parents[2]
SESSIONS = {
    "nox -s conformance": ["conformance"],
    "nox -s conformance -- --subject litgpt": ["conformance", "--", "--subject", "litgpt"],
    "nox -s tests": ["tests"],
    "nox -s bench -- --device cpu": ["bench", "--", "--device", "cpu"],
    "nox -s mutants": ["mutants"],
}


def seconds_of(command: list[str], folder: Path, codes: tuple[int, ...] = (0,)) -> float:
    """Wall time of a command.

    Raises:
        SystemExit: if it ended with another exit code, with the end of what it printed.
    """
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    taken = time.perf_counter() - started
    if done.returncode not in codes:
        raise SystemExit(f"{' '.join(command)} ended with exit code {done.returncode}:\n{done.stdout[-2000:]}")
    return taken


def commands() -> dict[str, Callable[[], float]]:
    """The commands as the README writes them, and how each is measured."""
    nox = [sys.executable, "-m", "nox", "--no-venv", "-s"]
    findings = {"nox -s conformance -- --subject litgpt": (0, 1)}  # it fails clauses, which is no failure of ours
    found = {
        name: partial(seconds_of, [*nox, *arguments], ROOT, findings.get(name, (0,)))
        for name, arguments in SESSIONS.items()
    }
    return found | {"python -m reference train": train}


HELP = ("conformance", "conformance.bench", "reference")
"""Packages whose --help must answer at once."""


def help_ratios(rounds: int = 7) -> dict[str, float]:
    """Wall time of each package's --help over that of ``python -c pass``, the two in turn: medians of ratios."""
    nothing = [sys.executable, "-c", "pass"]
    ratios: dict[str, float] = {}
    for package in HELP:
        command = [sys.executable, "-m", package, "--help"]
        pairs = [(seconds_of(command, ROOT), seconds_of(nothing, ROOT)) for _ in range(rounds)]
        ratios[f"python -m {package} --help"] = round(statistics.median(a / b for a, b in pairs), 1)
    return ratios


def train() -> float:
    """Wall time of a training run, with its data prepared before."""
    command = [sys.executable, "-m", "reference", "train"]
    with tempfile.TemporaryDirectory() as folder:
        seconds_of([*command, "--train.updates", "1", "--train.warmup", "0", "--directory", "first"], Path(folder))
        return seconds_of(command, Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help="keep the figures as JSON, beside those it has")
    parser.add_argument("--only", action="append", default=[], choices=commands(), help="repeatable")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"schema": 1, "environment": environment(), "seconds": {}}
    if arguments.write and arguments.write.exists():
        before = json.loads(arguments.write.read_text(encoding="utf-8"))
        if before["environment"] == result["environment"]:
            result = before
    if not arguments.only:
        result["times python -c pass"] = help_ratios()
    try:
        for name, measure in commands().items():
            if arguments.only and name not in arguments.only:
                continue
            result["seconds"][name] = round(measure(), 1)
            print(f"{name}: {result['seconds'][name]} s", flush=True)
    finally:  # not before, since the tests compare the file with the README
        if arguments.write:
            arguments.write.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
