"""The bench's page: the question first, everything that was measured on it, nothing fetched, no text as markup."""

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from conformance.bench.chart import answers, choices, cost_table, scale_of
from conformance.bench.page import bench_page, main
from conformance.bench.plain import to_plain
from conformance.bench.summary import Summary
from tests.bench.made_up import NAME, summary

HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(2)> $x^2$ {{ 7 * 7 }}"
REPORTS = Path(__file__).parents[2] / "reports" / "bench"


class Page(HTMLParser):
    """What a test wants to know about a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data


def written(tmp_path: Path, *summaries: Summary) -> Page:
    """Write summaries to files, and the page of them."""
    paths = [tmp_path / f"{number}.json" for number in range(len(summaries))]
    for path, found in zip(paths, summaries, strict=True):
        path.write_text(json.dumps(to_plain(found)), encoding="utf-8")
    assert bench_page(paths, tmp_path / "page") == tmp_path / "page/index.html"
    return Page(tmp_path / "page/index.html")


def test_the_page_stands_alone(tmp_path: Path) -> None:
    found = written(tmp_path, summary(), summary())
    assert [path.name for path in (tmp_path / "page").iterdir()] == ["index.html"]
    assert not {tag for tag, _ in found.tags} & {"script", "link", "img", "iframe", "object"}
    assert not [a for _, attributes in found.tags for a in attributes if a in ("src", "href", "style")]
    css = re.search(r"<style>(.*?)</style>", found.source, re.DOTALL)
    assert css is not None
    assert base64.b64encode(hashlib.sha256(css[1].encode()).digest()).decode() in found.source
    classes = {name for _, attributes in found.tags for name in attributes.get("class", "").split()}
    assert {"float32", "bfloat16", "either", "waits", "floor", "reach", "library"} <= classes
    assert all(f".{name}" in css[1] for name in classes)


def test_the_question_comes_first_and_the_details_are_folded(tmp_path: Path) -> None:
    found = written(tmp_path, summary())
    tags = [tag for tag, _ in found.tags]
    assert found.text.index("Which optimizer should I take") < found.text.index("Fastest in training: AdamW fused.")
    assert tags.index("svg") < tags.index("table") < tags.index("details")
    assert found.text.index("AdamW foreach") < found.text.index("2900 GB/s"), "the card comes after the results"
    assert not [attributes for tag, attributes in found.tags if tag == "details" and "open" in attributes]


def test_everything_that_was_measured_is_on_the_page(tmp_path: Path) -> None:
    run = summary()
    text = written(tmp_path, run).text
    for row in run.rows:
        assert row.name in text
    for expected in (
        "torchao AdamW8bit, fp32 was not measured: torchao cannot be imported: pip install torchao.",
        "Doubt: the card is warm",
        "Doubt about AdamW foreach, fp32: 2 of 12 rounds took over 10 times the median.",
        "* The GPU waits for the host during the step",
        "GrokAdamW, fp32: moments travel to the CPU.",
        "124.5 million parameters; 16,384 tokens a step",
        "2900 GB/s",
        "700 TFLOP/s (dense peak 989.4)",
        "SM 1110 of 1980 MHz",
        "software power cap",
        "Noise floor: a step took",
        "Drift: one step, at several times of the run, differed by up to",
        "MFU causal",
        "read p4 g4 m4 v4, write p4 m4 v4",
        "580.1",
    ):
        assert expected in text, expected


def test_each_colour_has_one_meaning_and_hollow_marks_wait_for_the_host(tmp_path: Path) -> None:
    run = summary()
    found = written(tmp_path, run)
    marks = [attributes["class"].split() for _, attributes in found.tags if "class" in attributes]
    colours = [set(names) & {"float32", "bfloat16", "either", "bar"} for names in marks]
    assert all(len(names) <= 1 for names in colours)
    hollow = [names for names in marks if "waits" in names and "either" not in names]
    waiting = {row.name for row in run.rows if row.measured and row.waits_for_host}
    drawn = [choice for choice in choices(run) for row in choice.steps.values() if row.waits_for_host]
    assert len(hollow) == len(drawn) > 0
    rows = dict(
        re.findall(r'<th scope="row">([^<]+?)(?: <b title="The GPU waits[^>]+>(\*)</b>)?(?: <b|</th>)', found.source)
    )
    assert {name for name, star in rows.items() if star} == waiting
    css = re.search(r"<style>(.*?)</style>", found.source, re.DOTALL)
    assert css is not None
    for scheme in css[1].split(":root {")[1:3]:
        names = [re.search(rf"--{name}: (#\w+)", scheme) for name in ("float32", "bfloat16", "own", "bar")]
        assert len({match[1] for match in names if match}) == 4


def test_a_second_run_is_folded_and_named_by_its_folder(tmp_path: Path) -> None:
    paths = [tmp_path / "card", tmp_path / "card/second-host", tmp_path / "other/second-host"]
    for path in paths:
        path.mkdir(parents=True)
        (path / "summary.json").write_text(json.dumps(to_plain(summary())), encoding="utf-8")
    text = Page(bench_page(paths, tmp_path / "page")).text
    assert re.findall(r"Another run: (.*?) torch", text) == [f"{NAME}: second-host (2)", f"{NAME}: second-host (3)"]


def test_no_summary_gets_in_as_markup(tmp_path: Path) -> None:
    run = summary()
    rows = [
        replace(row, name=f"{number} {HOSTILE}", doubts=(HOSTILE,), facts=row.facts | {"note": HOSTILE})
        for number, row in enumerate(run.rows)
    ]
    rows[3] = replace(rows[3], unavailable=HOSTILE)
    card = replace(run.card, name=HOSTILE, doubts=(HOSTILE,))
    environment = dict(run.environment) | dict.fromkeys(("torch", "clocks", "driver"), HOSTILE)
    found = written(tmp_path, replace(run, rows=tuple(rows), card=card, environment=environment, label=HOSTILE))
    assert not {tag for tag, _ in found.tags} & {"script", "img"}
    assert HOSTILE in found.text


def test_a_run_on_the_cpu_is_labelled(tmp_path: Path) -> None:
    label = "CPU, small: no figure of this run says anything about a GPU"
    found = written(tmp_path, replace(summary(), label=label, complete=False, quick=True))
    assert f"{label}." in found.text
    assert {"partial", "quick"} <= set(found.text.split())


def test_runs_without_optimizers_or_rows_have_a_page(tmp_path: Path) -> None:
    run = summary()
    only = written(tmp_path, replace(run, rows=tuple(row for row in run.rows if row.group == "training step")))
    assert "LitGPT, loss in one piece" in only.text
    assert "Fastest" not in only.text
    assert NAME in written(tmp_path, replace(run, rows=())).text


def test_the_committed_runs_can_be_read(tmp_path: Path) -> None:
    """As examples of what earlier releases wrote; which rows they have does not matter."""
    paths = sorted(path.parent for path in REPORTS.rglob("summary.json"))
    assert "Fastest" in Page(bench_page(paths, tmp_path)).text


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(to_plain(summary())), encoding="utf-8")
    assert main([str(tmp_path), "--out", str(tmp_path / "page")]) == 0
    assert capsys.readouterr().out.rstrip().endswith("page/index.html")
    assert main([str(path), "--out", str(path)]) == 2
    assert "given to --out, is a file: give a folder" in capsys.readouterr().err
    path.write_text("{}", encoding="utf-8")
    assert main([str(path), "--out", str(tmp_path / "page")]) == 2
    [sentence] = capsys.readouterr().err.splitlines()
    assert "is not a summary of the bench" in sentence


# --- the chart -------------------------------------------------------------------------------------------------------


def test_optimizers_are_compared_by_what_a_training_step_costs() -> None:
    found = choices(summary())
    assert [choice.name for choice in found] == ["AdamW fused", "AdamW foreach", "bitsandbytes AdamW8bit", "GrokAdamW"]
    assert Counter(len(choice.steps) for choice in found) == {1: 3, 2: 1}
    (fast, said), (small, costs) = answers(found)
    assert (fast, small) == ("Fastest in training: AdamW fused.", "Least memory: bitsandbytes AdamW8bit.")
    assert said.startswith("Its step over 124.5 million parameters in float32 takes 2.0")
    assert "2.04 bytes of state per parameter instead of 8.00" in costs
    assert "1.01 times as long as with AdamW fused" in costs  # by the interleaved ratio, which is made up


def test_without_training_rows_the_step_alone_counts() -> None:
    run = summary()
    found = choices(replace(run, rows=tuple(row for row in run.rows if row.group == "optimizer step")))
    assert answers(found)[0][0] == "Fastest: AdamW fused."
    heads, _ = cost_table(found)
    assert heads == ["float32, ms", "bfloat16, ms", "state, bytes each"]
    assert answers(choices(replace(run, rows=()))) == []


def test_a_step_that_only_hides_its_cost_is_told() -> None:
    run = summary()
    rows = [row for row in run.rows if row.name == "AdamW fused, fp32" and row.size == "gpt2-124m"]
    assert rows[0].wall_ms is not None
    late = replace(rows[0], wall_ms=replace(rows[0].wall_ms, median=80.0))
    [(_, said)] = answers(choices(replace(run, rows=(late,))))
    assert said.endswith("ms of the GPU, 80 ms from an idle one.")


@pytest.mark.parametrize("values", [(1.0,), (0.82, 699.0), (3.0, 3.0), (1e-4, 1e4)])
def test_every_time_has_a_place_on_the_scale(values: Sequence[float]) -> None:
    [choice] = choices(replace(summary(), rows=summary().rows[1:2]))
    [row] = choice.steps.values()
    steps = {
        str(value): replace(row, device_ms=time, wall_ms=time, floor_ms=None)
        for value in values
        for time in [replace(row.judged, median=value)]
    }
    scale = scale_of([replace(choice, steps=steps)])
    places = [scale.place(value) for value in values]
    assert all(0 <= place <= 100 for place in places)
    assert places == sorted(places)
    assert all(0 <= place <= 100 for place, _ in scale.ticks)
