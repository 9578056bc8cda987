"""From result files to pages: the matrix, a page and a badge per subject, pages of findings, a table in Markdown.

``python -m conformance report`` writes them. Each page fetches nothing and is readable without JavaScript.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from conformance.clause import CHAPTERS, Clause, catalogue, in_order
from conformance.errors import UsageError
from conformance.reading import make_folder
from conformance.report.arrangement import arranged, worst
from conformance.report.findings import Finding, explained
from conformance.report.markdown import SIGNS, matrix
from conformance.report.rendering import page_templates, slug_of
from conformance.report.result import Report, demand, read_json, read_report, repeat_command
from conformance.report.trend import trends
from conformance.session import OUTCOMES

FINDINGS = ("fail", "fixed", "error", "deviates")  # told first
BADGE_COLORS = {"fail": "#b3261e", "fixed": "#b3261e", "error": "#7a3e9d", "deviates": "#8a5a00", "pass": "#2b7035"}
KILL_FIELDS = {"mutants": "mutant published named killed_by errors diff", "harmless": "variant killed_by"}

LISTS = ("named", "killed_by", "errors", "diff")  # the other fields are texts
PARTS = {"core": "Core", "extension": "Extensions"}
STALE = ("subject-*.html", "badge-*.svg", "finding-*.html", "kill-matrix.html")


@dataclass(frozen=True)
class Column:
    """A report as a column of the matrix. Columns that are shown together differ in their slugs."""

    report: Report
    machine: str
    """GPU or processor; numbered where several reports have the same name, version and machine."""
    slug: str

    @property
    def title(self) -> str:
        """Name and version."""
        return f"{self.report.name} {self.report.version}"

    def repeat(self, clause: Clause) -> str:
        """Return the command that judges just this clause."""
        return repeat_command(self.report.spec, clause.id)


def read_columns(paths: Sequence[Path]) -> list[Column]:
    """Read result files of schema 1, in the order given.

    Raises:
        UsageError: for a file that cannot be read, is not JSON, or is not a result.
    """
    columns: list[Column] = []
    twins: Counter[tuple[str, str, str]] = Counter()
    for report in map(read_report, paths):
        gpu = report.environment.get("gpu", "none").removeprefix("NVIDIA ")
        machine = gpu if gpu != "none" else report.environment.get("processor", "unknown machine")
        machine = " ".join(re.sub(r"\((R|TM)\)|\b(Processor|CPU)\b|@.*", " ", machine).split())
        twins[twin := (report.name, report.version, machine)] += 1
        machine += f" #{twins[twin]}" if twins[twin] > 1 else ""
        taken = {column.slug for column in columns}
        columns.append(Column(report, machine, slug_of(f"{report.name}-{report.version}-{machine}", taken, "subject")))
    return columns


def read_kill_matrix(path: Path) -> dict[str, Any]:
    """Return what ``nox -s mutants -- --write`` has kept; UsageError if it cannot be read or is something else."""
    found = read_json(path, "kill matrix")
    for part, fields in KILL_FIELDS.items():
        rows = found.get(part)
        good = isinstance(rows, list) and all(isinstance(row, dict) and {*fields.split()} <= {*row} for row in rows)
        demand(good, f"the kill matrix {path} has no list {part!r} with {fields} in each row.")
        for row in rows or ():
            for field in fields.split():
                right = isinstance(row[field], list) and all(isinstance(text, str) for text in row[field])
                right = right if field in LISTS else isinstance(row[field], str)
                kind = "list of texts" if field in LISTS else "text"
                demand(right, f"the kill matrix {path} has a row in {part!r} whose {field!r} is not a {kind}.")
    return found


def chapters_of(columns: Sequence[Column]) -> dict[str, list[Clause]]:
    """Return all clauses by chapter: those of this suite, and those that only the result files know."""
    clauses = catalogue()
    for verdict in (verdict for column in columns for verdict in column.report.verdicts.values()):
        if verdict.id not in clauses:
            level: Any = verdict.level
            clauses[verdict.id] = Clause(
                verdict.id, verdict.requirement, "", "", "", "", level, verdict.since, (), (), print
            )
    chapters: dict[str, list[Clause]] = {}
    for identity in sorted(clauses, key=in_order):
        chapters.setdefault(clauses[identity].chapter, []).append(clauses[identity])
    return chapters


def render(
    columns: Sequence[Column],
    kill_matrix: Mapping[str, Any] | None,
    folder: Path,
    findings: Sequence[Finding] = (),
) -> list[str]:
    """Write all pages into a folder.

    These are index.html, matrix.md, and for each column its page and, unless it is partial, its badge; kill-matrix.html
    if there is one, and a page for each finding. Those of an earlier call are removed: no badge may outlive its result.

    Args:
        columns: the results.
        kill_matrix: from :func:`read_kill_matrix`; None for no page about it.
        folder: made if it is not there.
        findings: that failures link to.

    Returns:
        The names of the files.

    Raises:
        UsageError: if the folder cannot be written.
    """
    chapters = chapters_of(columns)
    clauses = [clause for group in chapters.values() for clause in group]
    own = {id(column.report): column for column in columns}
    steps = [(own[id(t.older)], own[id(t.newer)], t) for t in trends(column.report for column in columns)]
    links = {column.slug: explained(findings, column.report) for column in columns}

    templates = page_templates()
    templates.globals |= {"chapters": chapters, "titles": CHAPTERS, "clauses": clauses, "known": catalogue()}
    templates.globals |= {"signs": SIGNS, "bad": FINDINGS, "columns": columns, "explained": links}
    templates.globals |= {"divided": {part: [clause for clause in clauses if clause.part == part] for part in PARTS}}
    templates.globals |= {"titled": PARTS}

    kinds, others = arranged(columns)
    first = [column for group in kinds.values() for column in group]
    index: dict[str, Any] = {"kinds": kinds, "others": others, "shown": [*first, *others], "steps": steps}
    index |= {"worst": worst(first, clauses), "findings": findings, "kills": kill_matrix}
    index["total"] = sum((column.report.count(clauses) for column in first), Counter())
    pages = {"index.html": templates.get_template("index.html").render(index)}
    pages["matrix.md"] = matrix([(column.title, column.machine, column.report) for column in columns], chapters)
    if kill_matrix:
        pages["kill-matrix.html"] = templates.get_template("kills.html").render(kills_of(kill_matrix, clauses))
    for column in columns:
        told: dict[str, Any] = {"column": column, "count": column.report.count(clauses), "badge": None}
        told["steps"] = [step for step in steps if column in step[:2]]
        told["broken"] = findings_of(column.report, clauses)
        if not column.report.partial:
            told["badge"] = badge(column.report)
            drawn = templates.get_template("badge.svg").render(told["badge"])
            told["drawn"] = Markup(drawn)  # by a template that escapes
            pages[f"badge-{column.slug}.svg"] = drawn
        pages[f"subject-{column.slug}.html"] = templates.get_template("subject.html").render(told)
    for finding in findings:
        about = [column for column in columns if finding.explains(column.report)]
        pages[finding.page] = templates.get_template("finding.html").render(finding=finding, about=about)
    make_folder(folder, "--out")
    try:
        for stale in STALE:
            for path in folder.glob(stale):
                path.unlink()
        for name, text in pages.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"the folder {folder} cannot be written: {error.strerror}.") from error
    return list(pages)


def findings_of(report: Report, clauses: Sequence[Clause]) -> list[Clause]:
    """Return the clauses that are told first: by outcome, and of those what every stack must keep first."""

    def place(clause: Clause) -> tuple[int, bool, bool]:
        return FINDINGS.index(report.verdict(clause).outcome), clause.level != "must", clause.part != "core"

    return sorted((clause for clause in clauses if report.verdict(clause).outcome in FINDINGS), key=place)


def kills_of(kill_matrix: Mapping[str, Any], clauses: Sequence[Clause]) -> dict[str, Any]:
    """Return what the page of the kill matrix shows: a table for each chapter, with the clauses that are hit in it."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in kill_matrix["mutants"]:
        rows.setdefault("".join(row["named"][:1]).partition("-")[0], []).append(row)
    tables = {}
    for chapter, mutants in rows.items():
        hit = {identity for row in mutants for key in ("named", "killed_by", "errors") for identity in row[key]}
        tables[chapter] = (mutants, [clause for clause in clauses if clause.id in hit])
    killing = {identity for row in kill_matrix["mutants"] for identity in row["killed_by"]}
    survived = [row for row in kill_matrix["mutants"] if not {*row["named"]} <= {*row["killed_by"]}]
    idle = [clause for clause in clauses if clause.id not in killing]
    return {"tables": tables, "kills": kill_matrix, "survived": survived, "idle": idle}


def badge(report: Report) -> dict[str, Any]:
    """Return text, colour and widths of a badge. The text counts every outcome, so that it promises nothing more."""
    counted = Counter(verdict.outcome for verdict in report.verdicts.values())
    text = ", ".join(f"{counted[outcome]} {outcome}" for outcome in OUTCOMES if counted[outcome])
    color = next((color for outcome, color in BADGE_COLORS.items() if counted[outcome]), "#5b6168")
    return {"text": text, "color": color, "width": 6 * len(text) + 12}
