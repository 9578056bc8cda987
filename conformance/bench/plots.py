"""Which plots a page of the bench has, and of which rows."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from conformance.bench.optimizer_step import AGAINST_ITSELF
from conformance.bench.summary import Row
from conformance.bench.svg import FIRST, NARROW, SECOND, WIDE, Bar, Point, as_svg, draw_bars, draw_points
from conformance.bench.table import figure


@dataclass(frozen=True)
class Plot:
    """A plot, drawn for wide and for narrow pages."""

    title: str
    caption: str
    wide: Markup
    narrow: Markup


def draw_all(rows: Sequence[Row], marked: Mapping[str, str], identity: str) -> Iterable[Plot]:
    """The plots that these rows have the figures for.

    Args:
        rows: those that were measured.
        marked: their names with the marks of their footnotes.
        identity: begins the ids of the plots.
    """
    steps = [row for row in rows if row.get("share_of_floor") and not row["name"].endswith(AGAINST_ITSELF)]
    if steps:
        yield share_of_floor(steps, marked, f"{identity}-floor")
    training = [row for row in rows if row.get("tokens_per_second")]
    if any(row.get("peak_allocated") for row in training):
        yield time_against_memory([r for r in training if r.get("peak_allocated")], marked, f"{identity}-memory")
    peers = comparable(training)
    if peers:
        yield throughput(peers, marked, f"{identity}-peers")


def make_plot(title: str, caption: str, said: str, identity: str, draw: Callable[[int], Any]) -> Plot:
    """Draw it for both widths.

    Args:
        title: of the plot.
        caption: below the title.
        said: what it shows, for who cannot see it.
        identity: begins the ids.
        draw: gives the figure of a width in pixels.
    """
    wide, narrow = (Markup(as_svg(draw(width), title, said, f"{identity}-{width}")) for width in (WIDE, NARROW))
    return Plot(title, caption, wide, narrow)


def share_of_floor(rows: Sequence[Row], marked: Mapping[str, str], identity: str) -> Plot:
    """Bars, the best first; blue for float32 parameters, orange for bfloat16."""
    bars = []
    for row in sorted(rows, key=lambda row: -row["share_of_floor"]):
        floor, time, wall = row["floor_ms"] * 100, row["device_ms"], row["wall_ms"]["median"]
        bars.append(
            Bar(
                name=marked[row["name"]],
                value=floor / time["median"],
                low=floor / time["high"],
                high=floor / time["low"],
                label=f"{row['share_of_floor']:.1%}, {figure(time['median'])} ms, wall {figure(wall)}",
                color=SECOND if row["facts"].get("parameter dtype") == "bfloat16" else FIRST,
            )
        )
    best, worst = bars[0], bars[-1]
    return make_plot(
        "Share of the floor",
        "The floor is the time in which the card copies as many bytes as the step must read and write. "
        "Beside the bar: the share, the device's time for a step, and the wall time from an idle device.",
        f"{len(bars)} optimizers. The best is {best.name} at {best.label}, the last {worst.name} at {worst.label}.",
        identity,
        lambda width: draw_bars(bars, "% of the floor", width, (100.0, "the floor")),
    )


def time_against_memory(rows: Sequence[Row], marked: Mapping[str, str], identity: str) -> Plot:
    """A point for each row: the time per 1,000 tokens, so that other batch sizes fit in."""
    names, common = shorten([row["name"] for row in rows])
    points = [
        Point(
            name=short + marked[row["name"]].removeprefix(row["name"]),
            x=row["peak_allocated"] / 1e9,
            y=row["wall_ms"]["median"] * 1e3 / row["facts"]["tokens"],
            color=SECOND if "library" in row["facts"] else FIRST,
        )
        for row, short in zip(rows, names, strict=True)
    ]
    least, fastest = min(points, key=lambda point: point.x), min(points, key=lambda point: point.y)
    caption = "Toward the lower left is better."
    if any(point.color == SECOND for point in points):
        caption += " Circles: the reference. Diamonds: other libraries."
    return make_plot(
        "Step time against memory",
        caption + (f" All of them {common}, except where the name says otherwise." if common else ""),
        f"{len(points)} ways to train. {fastest.name} is the fastest with {fastest.y:.3g} ms per 1,000 tokens in "
        f"{fastest.x:.3g} GB; {least.name} needs the least memory, {least.x:.3g} GB, at {least.y:.3g} ms.",
        identity,
        lambda width: draw_points(points, "peak memory, GB", "ms per 1,000 tokens", width),
    )


def shorten(names: Sequence[str]) -> tuple[list[str], str]:
    """Names without ``reference`` and without the last part that most of them have, and that part."""
    part, count = Counter(name.rpartition(", ")[2] for name in names).most_common(1)[0]
    common = part if count > 1 and 2 * count > len(names) else ""
    suffix = f", {common}" if common else ""
    return [name.removesuffix(suffix).removeprefix("reference, ") for name in names], common


def comparable(rows: Sequence[Row]) -> list[Row]:
    """The other libraries, and the reference where it trains with the same settings; empty without other libraries."""

    def settings(row: Row) -> list[Any]:
        return [row["facts"].get(key) for key in ("tokens", "precision", "optimizer", "compiled")]

    peers = [row for row in rows if "library" in row["facts"]]
    wanted = [settings(row) for row in peers]
    own = [row for row in rows if "library" not in row["facts"] and settings(row) in wanted]
    # Of the reference's rows that train so, the first is the plain one.
    return [*own[:1], *peers] if peers else []


def throughput(rows: Sequence[Row], marked: Mapping[str, str], identity: str) -> Plot:
    """Bars, the fastest first; the reference in its own colour."""
    names = dict(zip((row["name"] for row in rows), shorten_settings(rows), strict=True))
    bars = []
    for row in sorted(rows, key=lambda row: -row["tokens_per_second"]):
        tokens, wall = row["facts"]["tokens"] * 1e3, row["wall_ms"]
        mfu = f", MFU {row['mfu']:.1%}" if row.get("mfu") else ""
        bars.append(
            Bar(
                name=names[row["name"]] + marked[row["name"]].removeprefix(row["name"]),
                value=row["tokens_per_second"] / 1e3,
                low=tokens / wall["high"] / 1e3,
                high=tokens / wall["low"] / 1e3,
                label=f"{row['tokens_per_second'] / 1e3:.4g} k/s{mfu}",
                color=SECOND if "library" in row["facts"] else FIRST,
            )
        )
    facts = rows[-1]["facts"]
    said = ", ".join(f"{bar.name} {bar.label}" for bar in bars)
    return make_plot(
        "Throughput beside other libraries",
        f"The same shape and settings for all: {facts.get('precision')}, {facts.get('optimizer')}, "
        f"{facts['tokens']:,.0f} tokens a step, {facts.get('compiled')}.",
        f"Thousand tokens per second: {said}.",
        identity,
        lambda width: draw_bars(bars, "thousand tokens per second", width),
    )


def shorten_settings(rows: Sequence[Row]) -> list[str]:
    """``reference`` for the reference, whose name is otherwise its settings; without what all say at the end."""
    names, _ = shorten([row["name"] for row in rows])
    return [name if "library" in row["facts"] else "reference" for name, row in zip(names, rows, strict=True)]


def superscript(numbers: Sequence[int]) -> str:
    """Marks of footnotes behind a name in a plot: `` ¹ ²``."""
    return "".join(" " + str(number).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")) for number in numbers)
