"""The pytest door: ``pytest -p conformance.plugin --pyargs conformance.suites --subject ...``.

The plugin is opt-in, so that a pytest run of somebody who has this package installed is as it would be without.
"""

import sys
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from conformance.clause import Clause
from conformance.engine import Sitting
from conformance.errors import UsageError, sentence
from conformance.options import OPTIONS, USAGE, Options
from conformance.session import BAD, Result

LETTERS = {"pass": ".", "fail": "F", "deviates": "d", "fixed": "X", "n/a": "-", "error": "E"}
SITTING = pytest.StashKey[Sitting]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take the options of ``python -m conformance run``."""
    group = parser.getgroup("conformance", "conformance of GPT training stacks")
    for flag, settings in OPTIONS.items():
        group.addoption(flag, **settings)


def pytest_configure(config: pytest.Config) -> None:
    """Open the sitting if an option asks for one: a mistake is told before anything is collected."""
    try:
        asked = Options.of(config.option) != Options()
    except UsageError as error:
        pytest.exit(sentence(error), USAGE)
    if asked:
        sitting(config)


def sitting(config: pytest.Config) -> Sitting:
    """Return the run's sitting, opened on first use. A mistake of the user's ends the run with one sentence."""
    if SITTING not in config.stash:
        if getattr(config.option, "numprocesses", None) or hasattr(config, "workerinput"):
            # pytest's own code for a wrong command line would be 4, and 5 for an empty selection
            pytest.exit("The clauses share their runs, so they cannot be spread over processes: drop -n.", USAGE)
        try:
            config.stash[SITTING] = Sitting(Options.of(config.option))
        except UsageError as error:
            pytest.exit(sentence(error), USAGE)
    return config.stash[SITTING]


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove what the runs wrote."""
    if SITTING in config.stash:
        config.stash[SITTING].close()


class ClauseItem(pytest.Item):
    """One clause as a test."""

    def __init__(self, *, clause: Clause, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.clause = clause
        self.result: Result | None = None

    def runtest(self) -> None:
        """Judge the clause."""
        self.result = sitting(self.config).judge(self.clause)
        if self.result.outcome in BAD:
            raise AssertionError(self.result.seen or self.result.reason)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> str:
        """Return the line that pytest prints for a failure; the letter says the rest."""
        if self.result is None:  # the plugin itself broke: pytest's own words
            return str(super().repr_failure(excinfo, style))
        return f"{self.clause.id} {self.result.outcome}: {self.result.seen or self.result.reason}"

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Return where the clause is, and what it is called."""
        return self.path, None, f"{self.clause.id} {self.clause.requirement}"


def pytest_pycollect_makeitem(collector: pytest.Module | pytest.Class, name: str, obj: object) -> ClauseItem | None:
    """Make an item of a function that is a clause."""
    identity = getattr(obj, "conformance_clause", None)
    if isinstance(identity, str):
        clause = sitting(collector.config).everything[identity]
        item: ClauseItem = ClauseItem.from_parent(collector, name=name, clause=clause)
        return item
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the clauses that were not asked for, and put the others into the order of the suite."""
    if SITTING not in config.stash:
        return
    chosen = sitting(config).chosen
    left_out = [item for item in items if isinstance(item, ClauseItem) and item.clause.id not in chosen]
    if left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
    order = {identity: number for number, identity in enumerate(chosen)}
    items.sort(key=lambda item: order[item.clause.id] if isinstance(item, ClauseItem) else -1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Mark pytest's report with the outcome of the clause."""
    report = yield
    if isinstance(item, ClauseItem) and call.when == "call" and item.result is not None:
        report.conformance = item.result.outcome  # type: ignore[attr-defined] # read in report_teststatus
        if item.result.outcome == "n/a":
            report.outcome = "skipped"
            report.longrepr = (str(item.path), 0, item.result.reason)
    return report


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """Return category, letter and word for the outcome of a clause."""
    outcome = getattr(report, "conformance", None)
    if outcome is None or report.when != "call":
        return None
    # "error" and "failed" are pytest's own: it would print these reports a second time, in its own way.
    return "no verdict" if outcome == "error" else outcome, LETTERS[outcome], outcome.upper()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Call an empty selection a wrong command line, as the other door does."""
    if SITTING in session.config.stash and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = USAGE


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    """Write the report and print the letter."""
    if SITTING not in config.stash:
        return
    run = sitting(config)
    if not run.results:
        terminalreporter.write_line("No clause was selected: check --clause, -k and the paths given.")
        return
    file: Any = getattr(terminalreporter, "_tw")._file if hasattr(terminalreporter, "_tw") else sys.stdout  # noqa: B009 # private, and the only way to print where pytest prints
    console = Console(file=file, highlight=False, width=None if file.isatty() else 100)
    run.finish(console, config.get_verbosity() > 0)


def pytest_report_header(config: pytest.Config) -> Iterable[str]:
    """Return the line that says what is judged."""
    if SITTING in config.stash:
        run = sitting(config)
        subject = f"{run.named.name} {run.named.version}"
        return [f"conformance: {subject}, {len(run.chosen)} clauses"]
    return []
