"""From result files to pages: the matrix, a page and a badge per subject, and a table in Markdown.

``python -m conformance report`` writes them. Each page fetches nothing and is readable without JavaScript.
"""

import base64
import hashlib
import html
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from conformance.clause import CHAPTERS, Clause, catalogue
from conformance.report.letter import SCHEMA, repeat_command
from conformance.session import OUTCOMES, Result
from conformance.subject import BUILT_IN, UsageError

SIGNS = dict(zip((*OUTCOMES, "not judged"), "✓✗≈!–?·", strict=True))  # noqa: RUF001 # an en dash is meant
"""Every outcome has a sign of its own, so that no reader needs the colours."""
FINDINGS = ("fail", "fixed", "error", "deviates")  # told first
BADGE_COLORS = {"fail": "#b3261e", "fixed": "#b3261e", "error": "#7a3e9d", "deviates": "#8a5a00", "pass": "#2b7035"}
FIELDS = {"subject": dict, "environment": dict, "partial": bool, "summary": dict, "clauses": list}
TEXTS = ("id", "level", "requirement", "outcome", "expected", "seen", "reason")
KILL_FIELDS = {"mutants": "mutant published named killed_by errors diff", "harmless": "variant killed_by"}


@dataclass(frozen=True)
class Verdict:
    """What a result file says about one clause."""

    id: str
    level: str
    requirement: str
    outcome: str
    expected: str = ""
    seen: str = ""
    reason: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """One result file: a column of the matrix. Reports that were read together differ in their slugs."""

    name: str
    version: str
    machine: str
    """GPU or processor; numbered where several files have the same name, version and machine."""
    slug: str
    spec: str
    environment: Mapping[str, str]
    partial: bool
    verdicts: Mapping[str, Verdict]

    def verdict(self, clause: Clause) -> Verdict:
        """What was found for a clause; also for one that this file does not have."""
        return self.verdicts.get(clause.id) or Verdict(clause.id, clause.level, clause.requirement, "not judged")

    def count(self, clauses: Iterable[Clause]) -> Counter[str]:
        """How many of some clauses have each outcome."""
        return Counter(self.verdict(clause).outcome for clause in clauses)

    def repeat(self, clause: Clause) -> str:
        """The command that judges just this clause, safe to paste into a shell."""
        return repeat_command(shlex.quote(self.spec), Result(clause, "pass"))


def read_results(paths: Sequence[Path]) -> list[Report]:
    """Read result files of schema 1, in the order given.

    Raises:
        UsageError: for a file that cannot be read, is no JSON, or is no result.
    """
    reports: list[Report] = []
    twins: Counter[tuple[str, str, str]] = Counter()
    for path in paths:
        found = read_json(path, "result file")
        for field, kind in FIELDS.items():
            demand(isinstance(found.get(field), kind), f"the result file {path} has no {field!r}, a {kind.__name__}.")
        subject, facts = found["subject"], {str(key): str(value) for key, value in found["environment"].items()}
        name, version = subject.get("name"), subject.get("version")
        demand(isinstance(name, str) and isinstance(version, str), f"the result file {path} names no subject.")
        gpu = facts.get("gpu", "none").removeprefix("NVIDIA ")
        machine = gpu if gpu != "none" else facts.get("processor", "unknown machine")
        machine = " ".join(re.sub(r"\((R|TM)\)|\b(Processor|CPU)\b|@.*", " ", machine).split())
        twins[twin := (name, version, machine)] += 1
        machine += f" #{twins[twin]}" if twins[twin] > 1 else ""
        stem = re.sub(r"[^a-z0-9.]+", "-", f"{name}-{version}-{machine}".lower()).strip("-.") or "subject"
        slugs = [stem, *(f"{stem}-{number}" for number in range(2, len(reports) + 2))]
        slug = next(slug for slug in slugs if slug not in {report.slug for report in reports})
        spec = facts.get("judged as", name.lower() if name.lower() in BUILT_IN else "your_module:Adapter")
        verdicts = read_verdicts(path, found["clauses"])
        reports.append(Report(name, version, machine, slug, str(spec), facts, found["partial"], verdicts))
    return reports


def demand(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)


def read_json(path: Path, kind: str) -> dict[str, Any]:
    """A JSON object of schema 1."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"the {kind} {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UsageError(f"the {kind} {path} is no JSON: {error}.") from error
    schema = found.get("schema") if isinstance(found, dict) else None
    demand(schema == SCHEMA, f"the {kind} {path} has schema {schema!r}, but this version reads schema {SCHEMA}.")
    return found  # type: ignore[no-any-return] # only a dict has the schema


def read_verdicts(path: Path, rows: Sequence[Any]) -> dict[str, Verdict]:
    """The clauses of a result file by id."""
    verdicts: dict[str, Verdict] = {}
    for number, row in enumerate(rows, 1):
        where = f"clause {number} of the result file {path}"
        demand(isinstance(row, dict) and isinstance(row.get("seconds"), int | float), f"{where} has no 'seconds'.")
        for field in TEXTS:
            demand(isinstance(row.get(field), str), f"{where} has no text {field!r}.")
        identity, outcome = row["id"], row["outcome"]
        new = identity not in verdicts and re.fullmatch(r"[A-Z]+-[0-9]+", identity) is not None
        demand(new, f"{where} has the id {identity!r}, which is none or not the only one.")
        demand(outcome in OUTCOMES, f"{where} has the outcome {outcome!r}, which is none of {', '.join(OUTCOMES)}.")
        verdicts[identity] = Verdict(*(row[field] for field in (*TEXTS, "seconds")))
    return verdicts


def read_kill_matrix(path: Path) -> dict[str, Any]:
    """What ``nox -s mutants -- --write`` has kept; UsageError if it cannot be read or is something else."""
    found = read_json(path, "kill matrix")
    for part, fields in KILL_FIELDS.items():
        rows = found.get(part)
        good = isinstance(rows, list) and all(isinstance(row, dict) and {*fields.split()} <= {*row} for row in rows)
        demand(good, f"the kill matrix {path} has no list {part!r} with {fields} in each row.")
    return found


def chapters_of(reports: Sequence[Report]) -> dict[str, list[Clause]]:
    """All clauses by chapter: those of this suite, then those that only the result files know."""
    clauses = catalogue()
    for verdict in (verdict for report in reports for verdict in report.verdicts.values()):
        level: Any = verdict.level
        clauses.setdefault(verdict.id, Clause(verdict.id, verdict.requirement, "", "", "", "", level, (), print))
    chapters: dict[str, list[Clause]] = {}
    for clause in clauses.values():
        chapters.setdefault(clause.chapter, []).append(clause)
    return chapters


def render(reports: Sequence[Report], kill_matrix: Mapping[str, Any] | None, folder: Path) -> None:
    """Write index.html, matrix.md, and for each report its page and, unless it is partial, its badge.

    Pages and badges of an earlier call are removed: no badge may outlive its result.

    Raises:
        UsageError: if the folder cannot be written.
    """
    chapters = chapters_of(reports)
    clauses = [clause for group in chapters.values() for clause in group]
    mutants: dict[str, list[Mapping[str, Any]]] = {}
    for row in kill_matrix["mutants"] if kill_matrix else ():
        mutants.setdefault("".join(row["named"][:1]).partition("-")[0], []).append(row)
    killed = Counter(identity for rows in mutants.values() for row in rows for identity in row["killed_by"])

    templates = Environment(loader=PackageLoader("conformance.report"), autoescape=True, undefined=StrictUndefined)
    templates.trim_blocks = templates.lstrip_blocks = True
    templates.filters["prose"] = prose
    templates.globals |= {"chapters": chapters, "titles": CHAPTERS, "clauses": clauses, "known": catalogue()}
    templates.globals |= {"signs": SIGNS, "findings": FINDINGS, "reports": reports}
    for kind in ("css", "js"):  # inlined; the page's content policy allows these two texts and nothing else
        source = templates.get_template(f"page.{kind}").render()
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        templates.globals |= {kind: Markup(source), f"{kind}_hash": digest}

    index = {"kills": kill_matrix, "mutants": mutants, "killed": killed}
    index["total"] = sum((report.count(clauses) for report in reports), Counter())
    pages = {"index.html": templates.get_template("index.html").render(index)}
    pages["matrix.md"] = markdown(reports, chapters)
    for report in reports:
        subject = {"report": report, "count": report.count(clauses), "reproduced": reproduced(report, folder)}
        pages[f"subject-{report.slug}.html"] = templates.get_template("subject.html").render(subject)
        if not report.partial:
            pages[f"badge-{report.slug}.svg"] = templates.get_template("badge.svg").render(badge(report))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in (*folder.glob("subject-*.html"), *folder.glob("badge-*.svg")):
            stale.unlink()
        for name, text in pages.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"the folder {folder} cannot be written: {error.strerror}.") from error


def prose(text: str) -> Markup:
    """Escaped text in which `names` are set as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def reproduced(report: Report, folder: Path) -> dict[str, tuple[str, str]]:
    """By clause, link and title of what the ``findings`` beside or above the pages reproduce for this subject."""
    found: dict[str, tuple[str, str]] = {}
    own = re.compile(rf"# .* {re.escape(report.name)}( {re.escape(report.version)})?, reproduced by hand\n")
    for ups, parent in enumerate(folder.absolute().parents[:2], 1):
        for path in sorted((parent / "findings").glob("*.md")):
            text = path.read_text(encoding="utf-8")
            if own.match(text):
                link = "../" * ups + f"findings/{path.name}"
                titles = re.findall(r"^## \d+\. ([A-Z]+-\d+) \(\w+\): (.+)$", text, re.MULTILINE)
                found |= {identity: (link, title) for identity, title in titles}
    return found


def badge(report: Report) -> dict[str, Any]:
    """Text, colour and widths of a badge. The text counts every outcome, so that it promises nothing more."""
    counted = Counter(verdict.outcome for verdict in report.verdicts.values())
    text = ", ".join(f"{counted[outcome]} {outcome}" for outcome in OUTCOMES if counted[outcome])
    color = next((color for outcome, color in BADGE_COLORS.items() if counted[outcome]), "#5b6168")
    return {"text": text, "color": color, "width": 6 * len(text) + 12}


def markdown(reports: Sequence[Report], chapters: Mapping[str, Sequence[Clause]]) -> str:
    """The matrix as a Markdown table, for a README."""

    def cell(text: str) -> str:
        return re.sub(r"([\\|*\[\]])", r"\\\1", html.escape(" ".join(text.split()), quote=False))

    heads = [f"{cell(f'{r.name} {r.version}')}<br>{cell(r.machine)}{'<br>partial' * r.partial}" for r in reports]
    rows = [["", "Requirement", *heads], ["---", "---", *(":-:" for _ in reports)]]
    for chapter, clauses in chapters.items():
        counts = [report.count(clauses) for report in reports]
        tallies = [" ".join(f"{n[outcome]}{sign}" for outcome, sign in SIGNS.items() if n[outcome]) for n in counts]
        rows.append([f"**{text}**" for text in (chapter, CHAPTERS.get(chapter, chapter), *tallies)])
        for clause in clauses:
            signs = [SIGNS[report.verdict(clause).outcome] for report in reports]
            rows.append([clause.id, cell(clause.requirement), *signs])
    legend = ", ".join(f"{sign} {outcome}" for outcome, sign in SIGNS.items())
    return "".join(f"| {' | '.join(row)} |\n" for row in rows) + f"\n{legend}\n"
