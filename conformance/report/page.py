"""From result files to pages: the matrix, a page and a badge per subject, and a table in Markdown.

``python -m conformance report`` writes them. Each page fetches nothing and is readable without JavaScript.
"""

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from conformance.clause import CHAPTERS, Clause, catalogue, in_order
from conformance.errors import UsageError
from conformance.reading import make_folder
from conformance.report.arrangement import arranged, worst
from conformance.report.markdown import SIGNS, matrix
from conformance.report.result import Report, demand, read_json, read_report, repeat_command
from conformance.session import OUTCOMES

FINDINGS = ("fail", "fixed", "error", "deviates")  # told first
BADGE_COLORS = {"fail": "#b3261e", "fixed": "#b3261e", "error": "#7a3e9d", "deviates": "#8a5a00", "pass": "#2b7035"}
KILL_FIELDS = {"mutants": "mutant published named killed_by errors diff", "harmless": "variant killed_by"}

LISTS = ("named", "killed_by", "errors", "diff")  # the other fields are texts


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
        stem = re.sub(r"[^a-z0-9.]+", "-", f"{report.name}-{report.version}-{machine}".lower()).strip("-.") or "subject"
        slugs = [stem, *(f"{stem}-{number}" for number in range(2, len(columns) + 2))]
        taken = {column.slug for column in columns}
        columns.append(Column(report, machine, next(slug for slug in slugs if slug not in taken)))
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


def render(columns: Sequence[Column], kill_matrix: Mapping[str, Any] | None, folder: Path) -> list[str]:
    """Write index.html, matrix.md, and for each column its page and, unless it is partial, its badge.

    Returns the names of these files. Pages and badges of an earlier call are removed: no badge may outlive its result.

    Raises:
        UsageError: if the folder cannot be written.
    """
    chapters = chapters_of(columns)
    clauses = [clause for group in chapters.values() for clause in group]
    mutants: dict[str, list[Mapping[str, Any]]] = {}
    for row in kill_matrix["mutants"] if kill_matrix else ():
        mutants.setdefault("".join(row["named"][:1]).partition("-")[0], []).append(row)
    killed = Counter(identity for rows in mutants.values() for row in rows for identity in row["killed_by"])

    templates = page_templates()
    templates.globals |= {"chapters": chapters, "titles": CHAPTERS, "clauses": clauses, "known": catalogue()}
    templates.globals |= {"signs": SIGNS, "findings": FINDINGS, "columns": columns}

    kinds, others = arranged(columns)
    first = [column for group in kinds.values() for column in group]
    index: dict[str, Any] = {
        "kills": kill_matrix,
        "mutants": mutants,
        "killed": killed,
        "kinds": kinds,
        "others": others,
    }
    index |= {"shown": [*first, *others], "worst": worst(first, clauses)}
    index["total"] = sum((column.report.count(clauses) for column in first), Counter())
    pages = {"index.html": templates.get_template("index.html").render(index)}
    pages["matrix.md"] = matrix([(column.title, column.machine, column.report) for column in columns], chapters)
    for column in columns:
        report = column.report
        subject = {"column": column, "count": report.count(clauses), "reproduced": reproduced(report, folder)}
        pages[f"subject-{column.slug}.html"] = templates.get_template("subject.html").render(subject)
        if not report.partial:
            pages[f"badge-{column.slug}.svg"] = templates.get_template("badge.svg").render(badge(report))
    make_folder(folder, "--out")
    try:
        for stale in (*folder.glob("subject-*.html"), *folder.glob("badge-*.svg")):
            stale.unlink()
        for name, text in pages.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"the folder {folder} cannot be written: {error.strerror}.") from error
    return list(pages)


def page_templates() -> Environment:
    """Return the templates of all pages, with style and script inlined.

    The pages' content policy allows these two texts and nothing else.
    """
    templates = Environment(loader=PackageLoader("conformance.report"), autoescape=True, undefined=StrictUndefined)
    templates.trim_blocks = templates.lstrip_blocks = True
    templates.filters["prose"] = prose
    for kind in ("css", "js"):
        source = templates.get_template(f"page.{kind}").render()
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        templates.globals |= {kind: Markup(source), f"{kind}_hash": digest}
    return templates


def prose(text: str) -> Markup:
    """Return escaped text in which `names` are set as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def reproduced(report: Report, folder: Path) -> dict[str, tuple[str, str]]:
    """Return, by clause, link and title of what the ``findings`` near the pages reproduce for this subject."""
    found: dict[str, tuple[str, str]] = {}
    own = re.compile(rf"# .* {re.escape(report.name)}( {re.escape(report.version)})?, reproduced by hand\n")
    for ups, parent in enumerate(folder.absolute().parents[:2], 1):
        for path in sorted((parent / "findings").glob("*.md")):
            text = path.read_text(encoding="utf-8")
            if own.match(text):
                link = "../" * ups + f"findings/{path.name}"
                titles = re.findall(r"^## \d+\. ([A-Z]+-\d+(?:, [A-Z]+-\d+)*) \(\w+\): (.+)$", text, re.MULTILINE)
                found |= {identity: (link, title) for several, title in titles for identity in several.split(", ")}
    return found


def badge(report: Report) -> dict[str, Any]:
    """Return text, colour and widths of a badge. The text counts every outcome, so that it promises nothing more."""
    counted = Counter(verdict.outcome for verdict in report.verdicts.values())
    text = ", ".join(f"{counted[outcome]} {outcome}" for outcome in OUTCOMES if counted[outcome])
    color = next((color for outcome, color in BADGE_COLORS.items() if counted[outcome]), "#5b6168")
    return {"text": text, "color": color, "width": 6 * len(text) + 12}
