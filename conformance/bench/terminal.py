"""A summary on the terminal: pytest-benchmark's own table knows neither a GPU nor a floor."""

import math
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from conformance.bench.columns import columns_of, describe_drifts, notes_of, parameters_of
from conformance.bench.compare import Comparison
from conformance.bench.noise import device_drifts, host_drifts, noise_floor
from conformance.bench.summary import Row, Summary, grouped

COLORS = {"faster": "green", "slower": "bold red", "ambiguous": "dim"}


def print_summary(console: Console, summary: Summary) -> None:
    """Print the card, one table for each group and size, notes and doubts."""
    console.print()
    if summary.label:
        console.print(f"[bold yellow]{escape(summary.label)}[/]")
    known = {name: escape(value) for name, value in summary.environment.items()}
    versions = (("driver", "driver"), ("CUDA", "cuda"), ("torch", "torch"), ("Python", "python"))
    told = ", ".join(f"{title} {known.get(name, 'unknown')}" for title, name in versions)
    console.print(f"[bold]{escape(summary.card.name)}[/]  [dim]{told}[/]", soft_wrap=True)
    for line in describe_card(summary):
        console.print(escape(line), soft_wrap=True)
    for doubt in summary.card.doubts:
        console.print(f"[yellow]Doubt:[/] {escape(doubt)}", soft_wrap=True)
    for (group, size), rows in grouped(summary.rows).items():
        print_rows(console, f"{group}, {size}", rows)
    if not summary.complete:
        console.print("[yellow]Partial: not every row was measured.[/]")


def describe_card(summary: Summary) -> list[str]:
    """Say what the card can do, what state it was in, and how far apart figures lie although nothing differs."""
    card, known = summary.card, summary.environment
    peak = "unknown" if card.dense_peak is None else f"{card.dense_peak / 1e12:.4g}"
    lines = [
        f"copy bandwidth {card.copy_bandwidth / 1e9:.0f} GB/s, read and written; bf16 product "
        f"{card.bf16_rate / 1e12:.4g} TFLOP/s (dense peak {peak})",
        f"clocks under load: {known.get('clocks', 'unknown')}; throttled by: {known.get('throttle', 'unknown')}",
    ]
    if card.noise is not None:
        noise = card.noise
        lines.append(
            f"noise floor: a step took {noise.ratio:.4f} ({noise.low:.4f} to {noise.high:.4f}) of its own time, "
            f"interleaved with itself, so a ratio within {noise_floor(summary):.2%} of 1 is no difference"
        )
    if drifted := describe_drifts(device_drifts(summary)):
        lines.append(f"drift: one step, at several times of the run, differed by up to {drifted}")
    if drifted := describe_drifts(host_drifts(summary)):
        lines.append(f"drift of the host: its work for one step differed by up to {drifted}")
    return lines


def print_rows(console: Console, title: str, rows: Sequence[Row]) -> None:
    """Print one table, and below it what its cells cannot hold."""
    measured = [row for row in rows if row.measured]
    console.print(f"\n[bold]{escape(title)}[/]  [dim]{parameters_of(measured)}[/]")
    columns = columns_of(measured)
    if measured:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("")
        for column in columns:
            table.add_column(column.head, justify="right", no_wrap=True)
        for row in measured:
            mark = " [yellow]?[/]" if row.doubts else ""
            table.add_row(escape(row.name) + mark, *(escape(column.cell(row)) for column in columns))
        console.print(table)
    for note in notes_of(rows):
        console.print(f"[dim]{escape(note)}[/]", soft_wrap=True)
    for row in measured:
        for doubt in row.doubts:
            console.print(f"[yellow]?[/] {escape(row.name)}: {escape(doubt)}", soft_wrap=True)


def print_comparison(console: Console, comparisons: Sequence[Comparison]) -> None:
    """Print every row that both runs have, with a verdict."""
    known = "a difference counts only if it exceeds the noise of both runs"
    if any(math.isinf(found.noise) for found in comparisons):
        known = "a run did not measure its noise floor, so nothing can be said"
    console.print(f"\n[bold]Compared[/]  [dim]new time over old time; {known}[/]")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in ("", "", "time", "ratio", "95 %", "noise", "verdict"):
        table.add_column(head)
    for found in comparisons:
        group, size, name = found.key
        table.add_row(
            escape(f"{group}, {size}"),
            escape(name),
            found.clock,
            f"{found.ratio.median:.3f}",
            f"{found.ratio.low:.3f}-{found.ratio.high:.3f}",
            "unknown" if math.isinf(found.noise) else f"{found.noise:.2%}",
            f"[{COLORS[found.verdict]}]{found.verdict}[/]",
        )
    console.print(table)
