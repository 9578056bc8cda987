"""From the bench's summaries to one page with plots: ``python -m conformance.bench.page FILE... --out FOLDER``.

The page is one file that fetches nothing and has no scripts. Every plot has its figures in a table below it.
"""

import argparse
import base64
import hashlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from conformance.bench.noise import device_drifts, host_drifts, noise_floor
from conformance.bench.plots import Plot, draw_all, superscript
from conformance.bench.summary import Row, grouped, parameters_of, read_summary
from conformance.bench.svg import check_matplotlib
from conformance.bench.table import LETTERS, describe_drifts, fact, figure, percent
from conformance.subject import UsageError


@dataclass
class Chapter:
    """The rows of one group and size."""

    title: str
    size: str
    about: str
    """Parameters and tokens in words."""
    plots: list[Plot]
    heads: list[str]
    rows: list[tuple[str, list[int], list[str], str]]
    """Name, numbers of footnotes, cells, and why there are no cells."""
    notes: list[str]
    """The footnotes, from 1."""
    missing: list[tuple[str, str]] = field(default_factory=list)
    """What was not measured, and why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code. A mistake of the user's is one sentence on stderr and 2."""
    parser = argparse.ArgumentParser(
        "python -m conformance.bench.page", description="Summaries of the bench -> a page."
    )
    parser.add_argument("summaries", nargs="+", type=Path, metavar="FILE", help="summary.json, or the folder of a run")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="index.html is written into it")
    options = parser.parse_args(arguments)
    try:
        print(f"Written: {os.path.relpath(bench_page(options.summaries, options.out))}")
    except UsageError as error:
        print(f"{str(error)[:1].upper()}{str(error)[1:]}", file=sys.stderr)
        return 2
    return 0


def bench_page(summaries: Sequence[Path], out: Path) -> Path:
    """Write ``index.html`` with the summaries in the order given.

    Args:
        summaries: files of schema 2, or the folders with them.
        out: the folder; made if it is not there.

    Returns:
        The page.

    Raises:
        UsageError: without matplotlib, for a file that is no summary, or if the folder cannot be written.
    """
    check_matplotlib()
    runs: list[dict[str, Any]] = []
    for number, path in enumerate(summaries, 1):
        summary = read_summary(path)
        check_summary(summary, path)
        run = describe_run(summary, f"run{number}")
        if any(run["name"] == earlier["name"] for earlier in runs):  # another run on the same card
            run["name"] += f": {(path if path.is_dir() else path.parent).name}"
        runs.append(run)
    templates = Environment(loader=PackageLoader("conformance.report"), autoescape=True, undefined=StrictUndefined)
    templates.trim_blocks = templates.lstrip_blocks = True
    style = "".join(templates.get_template(name).render() for name in ("page.css", "bench.css"))
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    text = templates.get_template("bench.html").render(runs=runs, css=Markup(style), css_hash=digest, letters=LETTERS)
    page = out / "index.html"
    try:
        out.mkdir(parents=True, exist_ok=True)
        page.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"the page {page} cannot be written: {error.strerror}.") from error
    return page


def check_summary(summary: Mapping[str, Any], path: Path) -> None:
    """Raise UsageError if what the page shows is not there."""

    def demand(good: bool, what: str) -> None:
        if not good:
            raise UsageError(f"the summary {path} {what}: give the summary.json of an earlier run.")

    card, rows = summary["card"], summary["rows"]
    demand(isinstance(summary["environment"], dict), "has no environment")
    demand(isinstance(card, dict) and isinstance(rows, list), "has no card or no rows")
    for key in ("copy_bandwidth", "bf16_rate"):
        demand(isinstance(card.get(key), int | float), f"has no {key!r} of the card")
    for number, row in enumerate(rows, 1):
        demand(isinstance(row, dict), f"has a row {number} that is none")
        for key, kind in (("group", str), ("size", str), ("name", str), ("facts", dict), ("doubts", list)):
            demand(isinstance(row.get(key), kind), f"has no {key!r} in row {number}")
        if row.get("unavailable") is None:
            for key in ("device_ms", "wall_ms"):
                values = row.get(key)
                found = [values.get(name) for name in ("median", "low", "high")] if isinstance(values, dict) else [None]
                good = all(isinstance(value, int | float) and value > 0 for value in found)
                demand(good, f"has no {key!r} with median, low and high in row {number}")
            beside = row.get("interleaved") or {}
            level = beside.get("beside_ms", 1.0) if isinstance(beside, dict) else None  # older runs have none
            demand(
                isinstance(level, int | float) and level > 0,
                f"has no 'interleaved' as the bench writes it in row {number}",
            )


def describe_run(summary: Mapping[str, Any], identity: str) -> dict[str, Any]:
    """What the template shows of one summary.

    Args:
        summary: as it was read.
        identity: begins the ids of its plots.
    """
    environment, card = summary["environment"], summary["card"]
    chapters = [
        describe_chapter(group, size, rows, f"{identity}-{number}")
        for number, ((group, size), rows) in enumerate(grouped(summary["rows"]).items(), 1)
    ]
    return {
        "name": str(card.get("name", "unknown card")),
        "label": summary.get("label"),
        "partial": not summary.get("complete", True),
        "quick": bool(summary.get("quick")),
        "torch": environment.get("torch", "unknown"),
        "facts": card_facts(summary),
        "doubts": card.get("doubts", []),
        "versions": [(name, value) for name, value in environment.items() if name not in SHOWN],
        "chapters": chapters,
        "formula": next((row["facts"]["formula"] for row in summary["rows"] if "formula" in row["facts"]), None),
        "peak": card.get("dense_peak"),
    }


SHOWN = ("gpu", "driver", "cuda", "clocks", "throttle", "throttle at the end")


def card_facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Terms and values: the card, its state, and what it can do at most."""
    environment, card = summary["environment"], summary["card"]
    rate, peak = f"{card['bf16_rate'] / 1e12:.4g} TFLOP/s", card.get("dense_peak")
    if peak:
        rate += f", {card['bf16_rate'] / peak:.0%} of the dense peak of {peak / 1e12:.4g} TFLOP/s"
    else:
        rate += "; the card's dense peak is not known, so there is no MFU"
    found = [
        ("Driver, CUDA", f"{environment.get('driver', 'unknown')}, {environment.get('cuda', 'unknown')}"),
        ("Clocks under load", str(environment.get("clocks", "unknown"))),
        ("Throttled by", str(environment.get("throttle", "unknown"))),
    ]
    if "throttle at the end" in environment:
        found.append(("At the end of the run", str(environment["throttle at the end"])))
    found += [("Copy bandwidth", f"{card['copy_bandwidth'] / 1e9:.4g} GB/s, read and written"), ("bf16 product", rate)]
    if card.get("noise"):
        noise = card["noise"]
        text = f"{noise['ratio']:.4f} ({noise['low']:.4f}–{noise['high']:.4f})"  # noqa: RUF001 # an en dash is meant
        found.append(
            ("Noise floor", f"{noise_floor(summary):.2%}: a step took {text} of its own time, interleaved with itself")
        )
    if drifted := describe_drifts(device_drifts(summary)):
        found.append(("Drift", f"one step, at several times of the run, differed by up to {drifted}"))
    if drifted := describe_drifts(host_drifts(summary)):
        found.append(("Drift of the host", f"what it does for a step differed by up to {drifted}"))
    return found


def interval(key: str) -> Callable[[Row], str]:
    """A column of medians with their intervals."""

    def cell(row: Row) -> str:
        low, middle, high = (figure(row[key][name]) for name in ("low", "median", "high"))
        return f"{middle} ({low}–{high})"  # noqa: RUF001 # an en dash is meant

    return cell


def value(key: str, unit: float = 1.0) -> Callable[[Row], str]:
    """A column of plain figures; empty where it is nothing."""
    return lambda row: figure(row[key] / unit) if row.get(key) else ""


def ratio(row: Row) -> str:
    """Against the row that it was interleaved with, which is named."""
    found = row.get("interleaved")
    if not found:
        return ""
    return f"{found['ratio']:.3f} ({found['low']:.3f}–{found['high']:.3f}) of {found['with']}"  # noqa: RUF001 # an en dash is meant


# Heading, and the cell of a row; a column that is empty in all rows is left out.
COLUMNS: list[tuple[str, Callable[[Row], str]]] = [
    ("device, ms", interval("device_ms")),
    ("wall, ms", interval("wall_ms")),
    ("host, ms", value("host_ms")),
    ("waits for", lambda row: "host" if row.get("waits_for_host") else ""),
    ("floor, ms", value("floor_ms")),
    ("share of floor", percent("share_of_floor")),
    ("tokens/s", value("tokens_per_second")),
    ("MFU", percent("mfu")),
    ("MFU, causal", percent("mfu_causal")),
    ("optimizer state, bytes/parameter", fact("state bytes per parameter")),
    ("peak memory, GB", value("peak_allocated", 1e9)),
    ("reserved, GB", value("peak_reserved", 1e9)),
    ("floor, bytes/parameter", fact("floor bytes per parameter")),
    ("which are", lambda row: str(row["facts"].get("floor arithmetic", ""))),
    ("time beside another row", ratio),
    ("rounds", lambda row: str(row.get("rounds", ""))),
]


def describe_chapter(group: str, size: str, rows: Sequence[Row], identity: str) -> Chapter:
    """Plots, table and footnotes of the rows of one group and size."""
    measured = [row for row in rows if row["unavailable"] is None]
    columns = [(head, cell) for head, cell in COLUMNS if any(cell(row) for row in measured)]
    notes: list[str] = []
    numbers: dict[str, list[int]] = {}
    for row in measured:
        texts = [f"Doubt: {text}" for text in row["doubts"]]
        texts += [text for text in [row["facts"].get("note")] if text]
        for text in texts:
            if text not in notes:
                notes.append(text)
        numbers[row["name"]] = [notes.index(text) + 1 for text in texts]
    lines = [
        (
            row["name"],
            numbers.get(row["name"], []),
            [] if row["unavailable"] else [cell(row) for _, cell in columns],
            row["unavailable"] or "",
        )
        for row in rows
    ]
    marked = {name: name + superscript(found) for name, found in numbers.items()}
    return Chapter(
        title=f"{group[:1].upper()}{group[1:]}",
        size=size,
        about=about(measured),
        plots=list(draw_all(measured, marked, identity)),
        heads=[head for head, _ in columns],
        rows=lines,
        notes=notes,
        missing=[(row["name"], row["unavailable"]) for row in rows if row["unavailable"]],
    )


def about(rows: Sequence[Row]) -> str:
    """How large what they step is; empty where that is not known."""
    found = [parameters_of(rows)]
    tokens = sorted({row["facts"]["tokens"] for row in rows if "tokens" in row["facts"]})
    if tokens:
        found.append(f"{' or '.join(f'{number:,.0f}' for number in tokens)} tokens a step")
    flops = next((row["facts"] for row in rows if "flops_per_token_causal" in row["facts"]), None)
    if flops:
        unit, word = (1e9, "GFLOP") if flops["flops_per_token"] >= 1e9 else (1e6, "MFLOP")
        whole, causal = (flops[key] / unit for key in ("flops_per_token", "flops_per_token_causal"))
        found.append(f"{whole:.3g} {word} a token, {causal:.3g} where only the causal half of the attention counts")
    return "; ".join(text for text in found if text)


if __name__ == "__main__":
    sys.exit(main())
