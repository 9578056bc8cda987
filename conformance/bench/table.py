"""The summary on the terminal: pytest-benchmark's own table knows neither a GPU nor a floor."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from conformance.bench.case import HEADLINE
from conformance.bench.compare import Comparison
from conformance.bench.noise import device_drifts, host_drifts, noise_floor
from conformance.bench.summary import Row, grouped, parameters_of

# What the letters of a floor's arithmetic stand for; the numbers behind them are bytes.
LETTERS = "p: parameter, g: gradient, m, v: moments, a: scales of 8-bit moments, e: GrokAdamW's average of gradients"

COLORS = {"faster": "green", "slower": "bold red", "ambiguous": "dim"}


def print_summary(console: Console, summary: Mapping[str, Any]) -> None:
    """Card, one table for each group and size, reasons and doubts."""
    environment, card = summary["environment"], summary["card"]
    console.print()
    if summary["label"]:
        console.print(f"[bold yellow]{escape(summary['label'])}[/]")
    console.print(
        f"[bold]{escape(card['name'])}[/]  [dim]driver {environment['driver']}, CUDA {environment['cuda']}, "
        f"torch {environment['torch']}, Python {environment['python']}[/]",
        soft_wrap=True,
    )
    peak = "unknown" if card["dense_peak"] is None else f"{card['dense_peak'] / 1e12:.0f}"
    console.print(
        f"copy {card['copy_bandwidth'] / 1e9:.0f} GB/s, bf16 {card['bf16_rate'] / 1e12:.4g} TFLOP/s "
        f"(dense peak {peak}); clocks: {escape(environment['clocks'])}; throttled by: {environment['throttle']}",
        soft_wrap=True,
    )
    if card["noise"] is not None:
        noise = card["noise"]
        console.print(
            f"noise floor: a step against itself took {noise['ratio']:.4f} ({noise['low']:.4f} to {noise['high']:.4f}) "
            f"of its time, so ratios within {noise_floor(summary):.2%} of 1 are none",
            soft_wrap=True,
        )
    if drifted := describe_drifts(device_drifts(summary)):
        console.print(f"drift: a step at several times of the run differed by up to {drifted}", soft_wrap=True)
    if drifted := describe_drifts(host_drifts(summary)):
        console.print(f"drift of the host: what it does for a step differed by up to {drifted}", soft_wrap=True)
    for doubt in card["doubts"]:
        console.print(f"[yellow]Doubt:[/] {escape(doubt)}", soft_wrap=True)
    for (group, size), rows in grouped(summary["rows"]).items():
        print_rows(console, f"{group}, {size}", rows)
    if not summary["complete"]:
        console.print("[yellow]Partial: not every row was measured.[/]")


def describe_drifts(drifts: Mapping[tuple[str, str], float]) -> str:
    """``1.5% (optimizer step, gpt2-124m), 0.4% (training step, gpt2-124m)``; empty if nothing was measured twice."""
    return ", ".join(f"{drift:.1%} ({group}, {size})" for (group, size), drift in drifts.items())


# Heading, and the cell of a row; a column that is empty in all rows is left out.
Column = tuple[str, Callable[[Row], str]]


def milliseconds(values: Mapping[str, float] | None) -> str:
    """Median, and the half width of the interval in percent."""
    if values is None:
        return ""
    spread = max(values["high"] - values["median"], values["median"] - values["low"]) / values["median"]
    return f"{figure(values['median'])} ±{spread:.1%}"


def figure(value: float | None) -> str:
    """Four significant digits, never in powers of ten."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def fact(name: str, unit: float = 1.0) -> Callable[[Row], str]:
    """A column of facts."""
    return lambda row: figure(row["facts"][name] / unit) if isinstance(row["facts"].get(name), int | float) else ""


def percent(name: str) -> Callable[[Row], str]:
    """A column of shares."""
    return lambda row: "" if row.get(name) is None else f"{row[name]:.1%}"  # an older summary may lack it


def ratio(row: Row) -> str:
    """Against the row that it was interleaved with."""
    found = row["interleaved"]
    return f"{found['ratio']:.3f} ({found['low']:.3f}-{found['high']:.3f})" if found else ""


COLUMNS: list[Column] = [
    ("device ms", lambda row: milliseconds(row["device_ms"])),
    ("wall ms", lambda row: milliseconds(row["wall_ms"])),
    ("host ms", lambda row: figure(row["host_ms"])),
    ("waits for", lambda row: "host" if row["waits_for_host"] else ""),
    ("floor ms", lambda row: figure(row["floor_ms"])),
    ("floor B/param", fact("floor bytes per parameter")),
    ("of floor", percent("share_of_floor")),
    ("state B/param", fact("state bytes per parameter")),
    ("tokens/s", lambda row: figure(row["tokens_per_second"])),
    ("MFU", percent("mfu")),
    ("MFU causal", percent("mfu_causal")),
    ("peak GB", lambda row: figure(row["peak_allocated"] / 1e9) if row["peak_allocated"] else ""),
    ("reserved GB", lambda row: figure(row["peak_reserved"] / 1e9) if row["peak_reserved"] else ""),
    ("ratio", ratio),
    ("rounds", lambda row: str(row["rounds"])),
]


def print_rows(console: Console, title: str, rows: Sequence[Row]) -> None:
    """One table, and below it what its cells cannot hold."""
    measured = [row for row in rows if row["unavailable"] is None]
    columns = [(head, cell) for head, cell in COLUMNS if any(cell(row) for row in measured)]
    console.print(f"\n[bold]{escape(title)}[/]  [dim]{parameters_of(measured)}[/]")
    if measured:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("")
        for head, _ in columns:
            table.add_column(head, justify="right", no_wrap=True)
        for row in measured:
            mark = " [yellow]?[/]" if row["doubts"] else ""
            table.add_row(escape(row["name"]) + mark, *(escape(cell(row)) for _, cell in columns))
        console.print(table)
    floors = {row["facts"]["floor arithmetic"]: row["facts"] for row in measured if "floor arithmetic" in row["facts"]}
    for arithmetic, facts in floors.items():
        moved = figure(facts["floor bytes per parameter"])
        console.print(f"[dim]floor of {moved} bytes per parameter: {escape(arithmetic)}[/]", soft_wrap=True)
    if floors:
        console.print(f"[dim]{LETTERS}[/]", soft_wrap=True)
    if any(row.get("mfu_causal") for row in measured):
        console.print(f"[dim]MFU: {escape(str(measured[0]['facts'].get('formula', '')))}[/]", soft_wrap=True)
    # The peers' one group is not the reference's two: another number of launches, and other tensors that decay.
    decays: dict[str, list[str]] = {}
    for row in measured:
        decays.setdefault(row["facts"].get("decays", ""), []).append(row["name"])
    for number, (what, which) in enumerate(sorted(decays.items(), key=lambda entry: -len(entry[1]))):
        if what:
            of = "; ".join(which) if number else "all other rows" if len(decays) > 1 else "all rows"
            console.print(f"[dim]weight decay of {escape(what)}: {escape(of)}[/]", soft_wrap=True)
    beside = sorted({row["interleaved"]["with"] for row in measured if row["interleaved"]})
    if beside:
        clock = HEADLINE.get(measured[0]["group"], "device")
        names = escape("; ".join(beside))
        console.print(f"[dim]ratio: {clock} time over that of {names}, interleaved with it round by round[/]")
    if any(row["peak_allocated"] and row["peak_reserved"] is None for row in measured):
        told = "reserved: left out where the row interleaved with it holds memory that this one may have used"
        console.print(f"[dim]{told}[/]", soft_wrap=True)
    for row in rows:
        if row["unavailable"] is not None:
            console.print(f"[dim]unavailable: {escape(row['name'])}: {escape(row['unavailable'])}[/]", soft_wrap=True)
        if isinstance(note := row["facts"].get("note"), str):
            console.print(f"[dim]note: {escape(row['name'])}: {escape(note)}[/]", soft_wrap=True)
        for doubt in row["doubts"]:
            console.print(f"[yellow]?[/] {escape(row['name'])}: {escape(doubt)}", soft_wrap=True)


def print_comparison(console: Console, comparisons: Sequence[Comparison]) -> None:
    """Every row in both runs, with a verdict."""
    known = "differences within the noise of either run are none"
    if any(math.isinf(found.noise) for found in comparisons):
        known = "a run did not measure its noise floor, so nothing can be said"
    console.print(f"\n[bold]Compared[/]  [dim]new time over old time; {known}[/]")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in ("", "", "time", "ratio", "95 %", "noise", "verdict"):
        table.add_column(head)
    for found in comparisons:
        group, size, name = found.key
        interval = f"{found.ratio.low:.3f}-{found.ratio.high:.3f}"
        noise = "unknown" if math.isinf(found.noise) else f"{found.noise:.2%}"
        answer = f"[{COLORS[found.verdict]}]{found.verdict}[/]"
        table.add_row(
            f"{group}, {size}", escape(name), found.clock, f"{found.ratio.median:.3f}", interval, noise, answer
        )
    console.print(table)
