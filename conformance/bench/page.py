"""From the bench's summaries to one page: ``python -m conformance.bench.page FILE... --out FOLDER``.

The page is one file that fetches nothing and has no scripts.
"""

import base64
import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from conformance.bench.case import TRAINING_STEP
from conformance.bench.chart import answers, choices, cost_table, scale_of
from conformance.bench.columns import (
    COLUMNS,
    WAITS_MEANS,
    columns_of,
    figure,
    gigabytes,
    notes_of,
    parameters_of,
    percent,
)
from conformance.bench.summary import Row, Summary, grouped, read_summary
from conformance.bench.terminal import describe_card
from conformance.errors import UsageError, sentence
from conformance.options import Parser
from conformance.reading import make_folder
from conformance.report.rendering import COMPILED


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code. A mistake of the user's is one sentence on stderr and 2."""
    parser = Parser("python -m conformance.bench.page", description="Write one page about runs of the bench.")
    parser.add_argument(
        "summaries", nargs="+", type=Path, metavar="FILE", help="a summary.json, or the folder of a run"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the folder to write index.html to")
    options = parser.parse_args(arguments)
    try:
        print(f"Written: {os.path.relpath(bench_page(options.summaries, options.out))}")
    except UsageError as error:
        print(sentence(error), file=sys.stderr)
        return 2
    return 0


def bench_page(paths: Sequence[Path], out: Path) -> Path:
    """Write ``index.html`` about some runs and return its path. The first run is open, the others are folded.

    Args:
        paths: summaries, or the folders with them.
        out: the folder; made if it is not there.

    Raises:
        UsageError: for a file that is not a summary, or if the folder cannot be written.
    """
    runs: dict[str, dict[str, object]] = {}
    for path in paths:
        summary = read_summary(path)
        folder, name = (path if os.path.isdir(path) else path.parent).resolve().name, summary.card.name
        runs[name if name not in runs else f"{name}: {folder} ({len(runs) + 1})"] = describe(summary)
    environment = Environment(
        loader=PackageLoader("conformance.bench"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        bytecode_cache=COMPILED,
    )
    environment.filters |= {"figure": figure, "percent": percent, "gigabytes": gigabytes}
    css = environment.get_template("bench.css").render()
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    template = environment.get_template("bench.html")
    text = template.render(runs=runs, css=Markup(css), css_hash=digest, columns=COLUMNS.values())
    page = out / "index.html"
    make_folder(out, "--out")
    try:
        page.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"the page {page} cannot be written: {error.strerror}.") from error
    return page


def describe(summary: Summary) -> dict[str, object]:
    """Return what the template shows of one run."""
    known, found = summary.environment, choices(summary)
    heads, costs = cost_table(found)
    tags = {"quick": summary.quick, "partial": not summary.complete}
    return {
        "label": summary.label,
        "tags": [f"torch {known.get('torch', 'unknown')}", *(tag for tag, wanted in tags.items() if wanted)],
        "doubts": summary.card.doubts,
        "answers": answers(found),
        "choices": found,
        "scale": scale_of(found) if found else None,
        "heads": heads,
        "costs": costs,
        "waits": WAITS_MEANS if any(row.waits_for_host for choice in found for row in choice.steps.values()) else "",
        "chapters": [describe_chapter(group, size, rows) for (group, size), rows in grouped(summary.rows).items()],
        "card": [f"{line[:1].upper()}{line[1:]}." for line in describe_card(summary)],
        "versions": sorted(known.items()),
    }


def describe_chapter(group: str, size: str, rows: Sequence[Row]) -> dict[str, object]:
    """Return what the template shows of the rows of one group and size."""
    measured = [row for row in rows if row.measured]
    tokens = sorted({number for row in measured if (number := row.number("tokens")) is not None})
    about = [parameters_of(measured)]
    about += [f"{' or '.join(f'{number:,.0f}' for number in tokens)} tokens a step"] if tokens else []
    trained = [(row.tokens_per_second, row) for row in measured if row.tokens_per_second is not None]
    return {
        "title": f"{group[:1].upper()}{group[1:]}, {size}",
        "about": "; ".join(text for text in about if text),
        "bars": sorted(trained, key=lambda entry: -entry[0]) if group == TRAINING_STEP else [],
        "columns": columns_of(measured),
        "rows": measured,
        "notes": [f"Doubt about {row.name}: {text}." for row in measured for text in row.doubts] + notes_of(rows),
    }


if __name__ == "__main__":
    sys.exit(main())
