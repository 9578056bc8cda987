"""The pytest plugin: options, the clause as a test item, the letter at the end.

It is loaded by every pytest run of whoever has the package installed, so it imports nothing but pytest until a
clause is collected or one of its options is used.
"""

from collections.abc import Generator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conformance.clause import Clause
    from conformance.session import Result

LETTERS = {"pass": ".", "fail": "F", "deviates": "d", "fixed": "X", "n/a": "-", "error": "E"}
USAGE = 2  # exit code of a mistake in the command line; pytest's own would be 4, and 5 for an empty selection


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance", "conformance of GPT training stacks")
    group.addoption(
        "--subject",
        metavar="NAME",
        help="the stack to judge: reference, litgpt, or module:Attribute of an adapter (default: reference)",
    )
    group.addoption("--report", metavar="FILE", help="write the results as JSON")
    group.addoption("--deviations", metavar="FILE", help="TOML file of clauses that are broken knowingly, with reasons")
    group.addoption(
        "--clause", metavar="ID", action="append", default=[], help="judge only this clause or chapter; repeatable"
    )


class Sitting:
    """What one pytest run keeps: the session with the subject, and the results so far."""

    def __init__(self, config: pytest.Config) -> None:
        from conformance.clause import catalogue, find_clauses
        from conformance.deviations import load_deviations
        from conformance.report.letter import check_writable
        from conformance.session import Session
        from conformance.subject import load_subject

        self.spec: str = config.option.subject or "reference"
        self.report = Path(config.option.report) if config.option.report else None
        if self.report is not None:
            check_writable(self.report)
        self.everything = catalogue()
        self.chosen = find_clauses(config.option.clause)
        file = config.option.deviations
        deviations = load_deviations(Path(file), self.everything) if file else {}
        self.session: Session = Session(load_subject(self.spec), deviations)
        self.results: list[Result] = []

    @property
    def partial(self) -> bool:
        """Whether any clause of the suite was not judged."""
        return {result.clause.id for result in self.results} != set(self.everything)


SITTING = pytest.StashKey[Sitting]()


def sitting(config: pytest.Config) -> Sitting:
    """The run's sitting, opened on first use. A mistake of the user's ends the run with one sentence."""
    if SITTING not in config.stash:
        from conformance.subject import UsageError

        if getattr(config.option, "numprocesses", None) or hasattr(config, "workerinput"):
            pytest.exit("The clauses share their runs, so they cannot be spread over processes: drop -n.", USAGE)
        try:
            config.stash[SITTING] = Sitting(config)
        except UsageError as error:
            pytest.exit(sentence(error), USAGE)
    return config.stash[SITTING]


def sentence(error: Exception) -> str:
    """A message with a capital letter."""
    text = str(error)
    return text[:1].upper() + text[1:]


def pytest_configure(config: pytest.Config) -> None:
    # Early, so that a mistake is told before anything is collected.
    option = config.option
    if option.subject or option.report or option.deviations or option.clause:
        sitting(config)


def pytest_unconfigure(config: pytest.Config) -> None:
    if SITTING in config.stash:
        config.stash[SITTING].session.close()


class ClauseItem(pytest.Item):
    """One clause as a test."""

    def __init__(self, *, clause: "Clause", **arguments: Any) -> None:
        super().__init__(**arguments)
        self.clause = clause
        self.result: Result | None = None

    def runtest(self) -> None:
        from conformance.session import BAD

        run = sitting(self.config)
        self.result = run.session.judge(self.clause)
        run.results.append(self.result)
        if self.result.outcome in BAD:
            raise AssertionError(self.result.seen or self.result.reason)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> str:
        if self.result is None:  # the plugin itself broke: pytest's own words
            return str(super().repr_failure(excinfo, style))
        return f"{self.clause.id} {self.result.outcome}: {self.result.seen or self.result.reason}"

    def reportinfo(self) -> tuple[Path, int | None, str]:
        return self.path, None, f"{self.clause.id} {self.clause.requirement}"


def pytest_pycollect_makeitem(collector: pytest.Module | pytest.Class, name: str, obj: object) -> ClauseItem | None:
    identity = getattr(obj, "conformance_clause", None)
    if isinstance(identity, str):
        clause = sitting(collector.config).everything[identity]
        item: ClauseItem = ClauseItem.from_parent(collector, name=name, clause=clause)
        return item
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if SITTING in config.stash:
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
    report = yield
    if isinstance(item, ClauseItem) and call.when == "call" and item.result is not None:
        report.conformance = item.result.outcome  # type: ignore[attr-defined] # read in report_teststatus
        if item.result.outcome == "n/a":
            report.outcome = "skipped"
            report.longrepr = (str(item.path), 0, item.result.reason)
    return report


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    outcome = getattr(report, "conformance", None)
    if outcome is None or report.when != "call":
        return None
    # "error" and "failed" are pytest's own: it would print these reports a second time, in its own way.
    return "no verdict" if outcome == "error" else outcome, LETTERS[outcome], outcome.upper()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if SITTING not in session.config.stash:
        return
    run = sitting(session.config)
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = USAGE
    if run.report is not None and run.results:
        from conformance.report.letter import as_json, write_json

        write_json(run.report, as_json(run.session.subject, run.spec, ordered(run), run.partial))


def ordered(run: Sitting) -> "list[Result]":
    """Results in the order of the suite."""
    order = list(run.everything)
    return sorted(run.results, key=lambda result: order.index(result.clause.id))


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    if SITTING not in config.stash:
        return
    run = sitting(config)
    if not run.results:
        terminalreporter.write_line("No clause was selected: check --clause, -k and the paths given.")
        return
    from rich.console import Console

    from conformance.report.letter import print_letter

    file = terminalreporter._tw._file
    console = Console(file=file, highlight=False, width=None if file.isatty() else 100)
    verbose = config.get_verbosity() > 0
    print_letter(console, run.session.subject, run.spec, ordered(run), run.partial, verbose)
    if run.report is not None:
        console.print(f"[dim]Written: {run.report}[/]")


def pytest_report_header(config: pytest.Config) -> Iterable[str]:
    if SITTING in config.stash:
        run = sitting(config)
        return [f"conformance: {run.session.subject.name} {run.session.subject.version}, {len(run.chosen)} clauses"]
    return []
