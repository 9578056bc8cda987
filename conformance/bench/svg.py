"""Plots of the bench: SVG by matplotlib, with the fonts and colours of the page around them.

A plot is drawn twice, for a wide page and for a phone, because its text does not shrink with it. Points and bars carry
their names, so no plot needs a legend.
"""

import bisect
import functools
import io
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from conformance.subject import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, NARROW = 760, 350  # pixels
TEXT, LINE = 12.0, 16.0  # height of the text and of a line of it, pixels

# What matplotlib draws in such a colour gets the class instead, and the page's style sheet says what colour that is:
# light or dark. The two of the data can be told apart by the colour-blind, and lie next to a name besides.
ROLES = {"#000001": "ink", "#000002": "dim", "#000003": "line", "#000004": "first", "#000005": "second"}
INK, DIM, RULE, FIRST, SECOND = ROLES


@dataclass(frozen=True)
class Bar:
    """A figure of one row with its interval."""

    name: str
    value: float
    low: float
    high: float
    label: str
    """What is written beside it."""
    color: str = FIRST


@dataclass(frozen=True)
class Point:
    """Two figures of one row."""

    name: str
    x: float
    y: float
    color: str = FIRST


def check_matplotlib() -> None:
    """Raise UsageError if it is not installed."""
    try:
        import matplotlib.backends.backend_svg  # noqa: F401 # only whether it is there
    except ImportError as error:
        raise UsageError(
            f"the page's plots need matplotlib, which cannot be imported ({error}): "
            "pip install 'gpt-conformance[plots]'."
        ) from error


def draw_bars(bars: Sequence[Bar], unit: str, width: int, limit: tuple[float, str] | None = None) -> "Figure":
    """Horizontal bars from zero, in the order given; on a narrow page the names stand above them.

    Args:
        bars: at least one.
        unit: what the axis counts.
        width: pixels.
        limit: a value that is marked by a line, and what it means.
    """
    narrow = width < 500
    step, top, bottom = 2 * LINE + 6 if narrow else LINE + 10, 26.0 if limit else 6.0, 42.0
    names = [cut(bar.name, width - 12 if narrow else 0.42 * width) for bar in bars]
    left = 5.0 if narrow else max(text_width(name) for name in names) + 18
    most = max([bar.high for bar in bars] + ([limit[0]] if limit else []))
    inner = width - left - max(text_width(bar.label) for bar in bars) - 18
    height = top + step * len(bars) + bottom
    figure, axes = new_figure(width, height, left, top, inner, step * len(bars))
    axes.set_xlim(0, most)
    axes.set_ylim(step * len(bars), 0)
    axes.set_xlabel(unit, loc="left", labelpad=6)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(few_ticks(inner))
    axes.grid(axis="x", color=RULE, linewidth=1)
    for number, (bar, name) in enumerate(zip(bars, names, strict=True)):
        middle = number * step + (step - 11 if narrow else step / 2)
        axes.barh(middle, bar.value, height=12, color=bar.color, linewidth=0)
        axes.plot([bar.low, bar.high], [middle, middle], color=INK, linewidth=1.5, solid_capstyle="butt")
        write(axes, bar.label, (inner + 10, middle), inner, color=INK, va="center_baseline")
        if narrow:
            write(axes, name, (0, middle - 12), inner, color=DIM)
        else:
            write(axes, name, (-10, middle), inner, color=INK, ha="right", va="center_baseline")
    if limit is not None:
        for number in range(len(bars)):  # beside the bars only, where the names stand above them
            ends = [number * step + (step - 20 if narrow else 0), (number + 1) * step]
            axes.plot([limit[0]] * 2, ends, color=DIM, linewidth=1.5, zorder=1.5, solid_capstyle="butt")
        write(axes, limit[1], (limit[0] / most * inner, -8), inner, color=DIM, ha="right")
    return figure


def draw_points(points: Sequence[Point], x: str, y: str, width: int) -> "Figure":
    """Points in a plane from zero, or with logarithmic axes where the values need them; their names to the right.

    Args:
        points: at least one.
        x: what the horizontal axis counts.
        y: what the vertical one counts.
        width: pixels.
    """
    narrow = width < 500
    letters = 22 if narrow else 46
    names = {point: textwrap.wrap(point.name, letters) for point in points}
    column = max(text_width(line) for lines in names.values() for line in lines) + 9
    sizes = {point: LINE * len(names[point]) + (4 if narrow else 2) for point in points}
    left, top, bottom = 46.0, 26.0, 44.0
    inner_width = width - left - column - (22 if narrow else 50)
    inner_height = max(240.0, sum(sizes.values()))
    figure, axes = new_figure(width, top + inner_height + bottom, left, top, inner_width, inner_height)
    for axis, values in (("x", [point.x for point in points]), ("y", [point.y for point in points])):
        if max(values) > 30 * min(values):
            getattr(axes, f"set_{axis}scale")("log")
            getattr(axes, f"set_{axis}lim")(min(values) / 1.5, max(values) * 1.5)
        else:
            getattr(axes, f"set_{axis}lim")(0, max(values) * 1.08)
            room = inner_width if axis == "x" else inner_height * 1.6  # figures are wider than high
            getattr(axes, f"{axis}axis").set_major_locator(few_ticks(room))
    axes.grid(color=RULE, linewidth=1)
    axes.set_xlabel(x, loc="left", labelpad=6)
    write(axes, y, (-left + 2, -10), inner_width, inner_height, color=DIM)
    to_pixels = axes.transData + axes.transAxes.inverted()
    places = {point: (1 - to_pixels.transform((point.x, point.y))[1]) * inner_height for point in points}
    ordered = sorted(points, key=lambda point: places[point])
    spread = spread_out([places[point] for point in ordered], [sizes[point] for point in ordered], inner_height)
    for point, middle in zip(ordered, spread, strict=True):
        start = to_pixels.transform((point.x, point.y))[0] * inner_width
        elbow = inner_width + (14 if narrow else 40)
        across = [start / inner_width, elbow / inner_width]
        down = [1 - places[point] / inner_height, 1 - middle / inner_height]
        axes.plot(across, down, transform=axes.transAxes, color=DIM, linewidth=0.6, clip_on=False)
        shape: dict[str, Any] = (
            {"marker": "o", "markersize": 8} if point.color == FIRST else {"marker": "D", "markersize": 7}
        )
        shape |= {"color": point.color, "markeredgewidth": 0, "clip_on": False, "zorder": 3}
        axes.plot([point.x], [point.y], **shape)
        axes.plot(across[1:], down[1:], transform=axes.transAxes, **shape)
        lines = names[point]
        for number, line in enumerate(lines):
            height = middle + (number - (len(lines) - 1) / 2) * LINE
            write(axes, line, (elbow + 9, height), inner_width, inner_height, color=INK, va="center_baseline")
    return figure


def spread_out(middles: Sequence[float], sizes: Sequence[float], room: float) -> list[float]:
    """Move labels apart that would overlap: their middles, as close to the wanted ones as their order allows.

    Args:
        middles: wanted, ascending.
        sizes: of the labels.
        room: all of them end within 0 and this; at least the sum of the sizes.
    """
    placed: list[float] = []
    end = 0.0
    for middle, size in zip(middles, sizes, strict=True):  # down, where the one above is in the way
        placed.append(max(middle, end + size / 2))
        end = placed[-1] + size / 2
    begin = room
    for number in reversed(range(len(placed))):  # and up again, where the room ends
        placed[number] = min(placed[number], begin - sizes[number] / 2)
        begin = placed[number] - sizes[number] / 2
    return placed


def new_figure(
    width: float, height: float, left: float, top: float, inner: float, inner_height: float
) -> "tuple[Figure, Axes]":
    """A figure and its axes at a place in pixels. One point is one pixel, as the SVG backend has it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    axes = figure.add_axes(
        (left / width, 1 - (top + inner_height) / height, inner / width, inner_height / height), frameon=False
    )
    axes.set_axisbelow(True)
    axes.tick_params(
        which="both", bottom=False, left=False, top=False, labelsize=TEXT, labelcolor=DIM, color=RULE, pad=5
    )
    axes.xaxis.label.set(color=DIM, fontsize=TEXT)
    return figure, axes


def write(
    axes: "Axes", text: str, place: tuple[float, float], width: float, height: float | None = None, **keywords: Any
) -> None:
    """Text at a place in pixels from the axes' upper left corner; ``$`` is a dollar."""
    if height is None:
        height = axes.get_ylim()[0]
    at = (place[0] / width, 1 - place[1] / height)
    axes.text(*at, text, transform=axes.transAxes, fontsize=TEXT, parse_math=False, clip_on=False, **keywords)


def few_ticks(room: float) -> Any:
    """As many ticks as have room, at round values."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=max(2, min(8, int(room // 70))), steps=[1, 2, 2.5, 5, 10])


def cut(text: str, room: float) -> str:
    """The text, or as much of its beginning as has room."""
    if text_width(text) <= room:
        return text
    end = bisect.bisect_right(range(len(text)), room, key=lambda end: text_width(text[:end] + "…")) - 1
    return text[: max(end, 0)] + "…"


@functools.lru_cache(maxsize=1024)
def text_width(text: str) -> float:
    """Pixels, in DejaVu Sans: wider than nearly all fonts of browsers."""
    from matplotlib.textpath import TextPath

    return float(TextPath((0, 0), text.replace("$", "S"), size=TEXT).get_extents().x1) if text.strip() else 0.0


def as_svg(figure: "Figure", title: str, description: str, identity: str) -> str:
    """The figure as an SVG element to stand in a page.

    It has no style of its own, since a page that forbids inline styles would not apply it: colours become classes
    (``fill-ink``, ``stroke-line``, ...), the rest attributes.

    Args:
        figure: drawn in the colours of :data:`ROLES`.
        title: for screen readers, as the description.
        description: what the plot shows.
        identity: begins the ids, which differ within a page.
    """
    import matplotlib

    written = io.BytesIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # so that the same figures give the same page
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": identity}):
        figure.savefig(written, format="svg", metadata=metadata, transparent=True)
    root = ElementTree.fromstring(written.getvalue())
    _, _, width, height = root.attrib["viewBox"].split()
    referred = set(re.findall(rb"(?:href=\"|url\()#([^\")]+)", written.getvalue()))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style") or not isinstance(child.tag, str):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]  # an HTML page needs no namespaces
        for name in list(element.attrib):
            value = element.attrib.pop(name)
            local = name.rpartition("}")[2]
            if local == "style":
                element.attrib |= plain_attributes(value)
            elif local == "id":
                if value.encode() in referred:
                    element.set("id", f"{identity}-{value}")
            elif local == "href":
                element.set("href", f"#{identity}-{value[1:]}")
            else:
                element.set(local, re.sub(r"url\(#", f"url(#{identity}-", value))
    names = {"title": title, "desc": description}
    for number, (tag, text) in enumerate(names.items()):
        child = ElementTree.Element(tag, {"id": f"{identity}-{tag}"})
        child.text = text
        root.insert(number, child)
    root.attrib = {
        "class": "plot",
        "role": "img",
        "aria-labelledby": f"{identity}-title {identity}-desc",
        "viewBox": f"0 0 {width} {height}",
        "width": width,
        "height": height,
    }
    return ElementTree.tostring(root, encoding="unicode")


def plain_attributes(style: str) -> dict[str, str]:
    """``fill: #000001; opacity: 0.5`` -> ``{"class": "fill-ink", "opacity": "0.5"}``; without fonts, but with sizes."""
    found: dict[str, str] = {}
    classes = []
    for part in style.split(";"):
        name, _, value = (text.strip() for text in part.partition(":"))
        if name in ("fill", "stroke") and value in ROLES:
            classes.append(f"{name}-{ROLES[value]}")
        elif name == "font":
            found["font-size"] = re.search(r"[\d.]+(?=px)", value)[0]  # type: ignore[index] # matplotlib writes it
        elif name == "font-size" or (name and not name.startswith("font-")):
            found[name] = value.removesuffix("px")
    return found | ({"class": " ".join(classes)} if classes else {})
