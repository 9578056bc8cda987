"""The bench's plots: nothing overlaps, nothing is cut off, and labels are moved as little as needed."""

import itertools
from typing import Any

import pytest

from conformance.bench.svg import FIRST, NARROW, SECOND, WIDE, Bar, Point, as_svg, draw_bars, draw_points, spread_out

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'gpt-conformance[plots]'")


def boxes(figure: Any) -> list[Any]:
    """Where the texts of a figure stand, in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    [axes] = figure.axes
    texts = [*axes.texts, axes.xaxis.label, axes.yaxis.label]
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    renderer = canvas.get_renderer()
    return [text.get_window_extent(renderer) for text in texts if text.get_text() and text.get_visible()]


def check_layout(figure: Any, width: float) -> None:
    """No text lies on another, and none is cut off."""
    found = boxes(figure)
    height = figure.get_size_inches()[1] * 72
    for box in found:
        assert box.x0 >= 0
        assert box.x1 <= width
        assert box.y0 >= 0
        assert box.y1 <= height
    for one, other in itertools.combinations(found, 2):
        apart = one.x1 <= other.x0 or other.x1 <= one.x0 or one.y1 <= other.y0 + 1 or other.y1 <= one.y0 + 1
        assert apart, (one, other)


LONG = "bitsandbytes PagedAdamW8bit with a name that nobody would read to its end, bf16 ¹ ²"


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("limit", [None, (100.0, "the floor")])
def test_bars_have_room(width: int, limit: tuple[float, str] | None) -> None:
    bars = [
        Bar("AdamW fused, fp32", 99.0, 97.0, 104.0, "99.0%, 1.972 ms, wall 2.113"),
        Bar(LONG, 30.0, 1.0, 31.0, "30.0%, 0.8188 ms, wall 0.9139", SECOND),
        Bar("a $x^2$", 0.1, 0.1, 0.1, "0.1%, 12734 ms, wall 12734"),
    ]
    check_layout(draw_bars(bars, "% of the floor", width, limit), width)


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_points_that_lie_on_each_other_have_room(width: int) -> None:
    points = [Point(f"{'bf16-mixed, AdamW8bit, StableEmbedding'[number:]} ¹", 5.0, 2.0) for number in range(14)]
    points += [Point("LitGPT, loss in chunks of 128", 21.0, 5.1, SECOND)]
    check_layout(draw_points(points, "peak memory, GB", "ms per 1,000 tokens", width), width)


def test_axes_are_logarithmic_only_where_they_must_be() -> None:
    def scales(*values: float) -> tuple[str, str]:
        figure = draw_points([Point(str(value), value, 1.0) for value in values], "x", "y", WIDE)
        return figure.axes[0].get_xscale(), figure.axes[0].get_yscale()

    assert scales(1.0, 20.0) == ("linear", "linear")
    assert scales(1.0, 50.0) == ("log", "linear")


def test_labels_are_moved_apart_as_little_as_needed() -> None:
    assert spread_out([10, 50], [20, 20], 100) == [10, 50]
    assert spread_out([50, 50, 50], [20, 20, 20], 100) == [50, 70, 90]
    assert spread_out([90, 95], [20, 20], 100) == [70, 90]
    assert spread_out([0, 0], [20, 20], 40) == [10, 30]


def test_a_plot_has_title_and_description() -> None:
    text = as_svg(draw_bars([Bar("a & b", 1, 1, 1, "1", FIRST)], "ms", NARROW), "A < B", "one bar", "some")
    assert '<title id="some-title">A &lt; B</title><desc id="some-desc">one bar</desc>' in text
    assert text.startswith('<svg class="plot" role="img" aria-labelledby="some-title some-desc" viewBox="0 0 350 ')
    assert ">a &amp; b</text>" in text
