"""The matrix of clauses and subjects as a Markdown table, for docs and READMEs."""

import html
import re
from collections.abc import Mapping, Sequence

from conformance.clause import CHAPTERS, Clause
from conformance.report.result import Report
from conformance.session import OUTCOMES

SIGNS = dict(zip((*OUTCOMES, "not judged"), "✓✗≈!–?·", strict=True))  # noqa: RUF001 # an en dash is meant
"""Every outcome has a sign of its own, so that no reader needs the colours."""


def matrix(columns: Sequence[tuple[str, str, Report]], chapters: Mapping[str, Sequence[Clause]]) -> str:
    """Return the table, and a legend below it.

    Args:
        columns: title, subtitle (may be empty) and report of each.
        chapters: the clauses to show, by chapter.
    """
    rows = [["", "Requirement", *map(head, columns)], ["---", "---", *(":-:" for _ in columns)]]
    for chapter, clauses in chapters.items():
        counts = [report.count(clauses) for _, _, report in columns]
        tallies = [" ".join(f"{n[outcome]}{sign}" for outcome, sign in SIGNS.items() if n[outcome]) for n in counts]
        rows.append([f"**{text}**" for text in (chapter, CHAPTERS.get(chapter, chapter), *tallies)])
        for clause in clauses:
            signs = [SIGNS[report.verdict(clause).outcome] for _, _, report in columns]
            words = cell(clause.requirement) + " (should)" * (clause.level == "should")
            rows.append([clause.id, words + " (extension)" * (clause.part == "extension"), *signs])
    legend = ", ".join(f"{sign} {outcome}" for outcome, sign in SIGNS.items())
    return "".join(f"| {' | '.join(row)} |\n" for row in rows) + f"\n{legend}\n"


def head(column: tuple[str, str, Report]) -> str:
    """Return the head of a column."""
    title, subtitle, report = column
    return "<br>".join(filter(None, (cell(title), cell(subtitle), "partial" * report.partial)))


def cell(text: str) -> str:
    """Return text that means nothing to Markdown or HTML."""
    return re.sub(r"([\\|*\[\]])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
