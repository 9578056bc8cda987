"""The tables of a run in Markdown, for the documentation."""

import re

from conformance.bench.case import AGAINST_ITSELF
from conformance.bench.columns import CHOICE, COLUMNS, columns_of, notes_of, parameters_of
from conformance.bench.summary import Summary, grouped


def tables(summary: Summary) -> dict[str, str]:
    """Return one table in Markdown for each group of rows, by the group's name, with its notes below.

    The sizes stand below each other. A row that was not measured is named in the notes, with its reason; the row that
    measured a step against itself is left out.
    """
    found: dict[str, str] = {}
    parts = {
        key: [row for row in rows if not row.name.endswith(AGAINST_ITSELF)]
        for key, rows in grouped(summary.rows).items()
    }
    for group in dict.fromkeys(group for group, _ in parts):
        sizes = {size: rows for (of, size), rows in parts.items() if of == group and rows}
        if not sizes:
            continue
        measured = [row for rows in sizes.values() for row in rows if row.measured]
        columns = columns_of(measured, CHOICE.get(group, tuple(COLUMNS)))
        heads = "".join(f" {column.head} |" for column in columns)
        lines = [f"| |{heads}", f"|---|{'--:|' * len(columns)}"]
        for size, rows in sizes.items():
            about = parameters_of([row for row in rows if row.measured])
            lines.append(f"| **{escaped(size)}**{f', {about}' if about else ''} |{' |' * len(columns)}")
            for row in rows:
                if row.measured:
                    cells = "".join(f" {escaped(column.cell(row))} |" for column in columns)
                    lines.append(f"| {escaped(row.name)} |{cells}")
        notes = []
        for size, rows in sizes.items():
            for note in notes_of(rows):
                common = all(note in notes_of(others) for others in sizes.values())
                notes.append(f"- {escaped(note if common else f'{size}: {note}')}")
        found[group] = "\n".join([*lines, "", *dict.fromkeys(notes)]).rstrip() + "\n"
    return found


def escaped(text: str) -> str:
    """Return text that Markdown shows as it is, in a cell, too."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", text)
