"""The bench's page: everything that was measured is on it, nothing overlaps, nothing is fetched."""

import base64
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conformance.bench import plots
from conformance.bench.card import Card
from conformance.bench.case import Case, Prepared, Setting
from conformance.bench.clock import Round
from conformance.bench.measure import Measurement, WarmUp
from conformance.bench.page import bench_page, main
from conformance.bench.summary import empty_row, grouped, make_row, make_summary
from tests.conformance.test_page import Page

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'gpt-conformance[plots]'")

NAME = "NVIDIA H100 80GB HBM3"
CARD = Card(NAME, copy_bandwidth=2.9e12, bf16_rate=7.0e14, dense_peak=989.4e12)
HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(2)> $x^2$ {{ 7 * 7 }}"
ENVIRONMENT = {
    "python": "3.12",
    "torch": "2.13.0",
    "gpu": NAME,
    "driver": "580.1",
    "cuda": "13.0",
    "clocks": "SM 1110 of 1980 MHz",
    "throttle": "software power cap",
}


def never(setting: Setting) -> Prepared:
    raise AssertionError("not built here")


def row(group: str, size: str, name: str, seconds: float, *, peak: int = 0, **facts: Any) -> dict[str, Any]:
    """As a run makes it."""
    generator = np.random.default_rng(0)
    times = [seconds * float(factor) for factor in generator.normal(1.0, 0.01, 12)]
    measured = Measurement(
        rounds=[Round(time, 1.01 * time, 0.5 * time) for time in times],
        beside=[Round(time, time, time) for time in times[::-1]],
        warm_up=WarmUp(3, seconds, settled=True),
        elapsed=1e9,
        peak_allocated=peak,
        peak_reserved=2 * peak,
    )
    return make_row(Case(group, size, name, never, beside="AdamW fused, fp32"), measured, facts, CARD)


def optimizer(name: str, seconds: float, size: str = "gpt2-124m", numbers: float = 124.5e6) -> dict[str, Any]:
    facts = {
        "parameters": numbers,
        "parameter dtype": "bfloat16" if "bf16" in name else "float32",
        "floor bytes per parameter": 28.0,
        "floor bytes": 28.0 * numbers,
        "floor arithmetic": "read p4 g4 m4 v4, write p4 m4 v4",
        "state bytes per parameter": 8.0,
    }
    return row("optimizer step", size, name, seconds, peak=10**9, **facts)


def training(
    name: str, seconds: float, size: str = "gpt2-124m", peak: int = 16 * 10**9, **facts: Any
) -> dict[str, Any]:
    known = {
        "tokens": 32768,
        "parameters": 124.5e6,
        "flops_per_token": 8.5e8,
        "flops_per_token_causal": 8.0e8,
        "formula": "6 N + 12 L d T FLOPs per token",
        "card": NAME,
        "dense_peak": 989.4e12,
        "precision": "bf16-mixed",
        "optimizer": "AdamW (fused)",
        "compiled": "compiled",
    }
    return row("training step", size, name, seconds, peak=peak, **(known | facts))


@pytest.fixture
def summary() -> dict[str, Any]:
    """Of a run with a row of every kind."""
    doubted = optimizer("AdamW foreach, fp32", 3.9e-3)
    doubted["doubts"].append("2 of 12 rounds took over 10 times the median")
    grok = optimizer("GrokAdamW, fp32", 0.6)
    grok["facts"]["note"] = "moments travel to the CPU"
    torchao = Case("optimizer step", "gpt2-124m", "torchao AdamW8bit, fp32", never)
    rows = [
        optimizer("AdamW fused, fp32, against itself", 2.0e-3),
        optimizer("AdamW fused, fp32", 2.0e-3),
        doubted,
        optimizer("AdamW fused, bf16", 1.9e-3),
        empty_row(torchao, "torchao cannot be imported: pip install torchao."),
        grok,
        optimizer("AdamW fused, fp32", 15e-3, "llama-1.2b", 1.34e9),
        training("reference, bf16-mixed, AdamW fused, compiled", 0.070),
        training("reference, bf16-mixed, AdamW8bit, compiled", 0.072, optimizer="AdamW8bit"),
        training("reference, bf16-mixed, AdamW fused, eager", 0.15, peak=21 * 10**9, compiled="eager"),
        training("reference, bf16-true, AdamW fused, compiled", 0.27, "llama-1.2b", tokens=16384),
        training("LitGPT, loss in one piece, compiled", 0.0691, library="litgpt 0.5.13", note="rotary positions"),
        training("transformers GPT2LMHeadModel, compiled", 0.069, library="transformers 5.17"),
    ]
    return make_summary(ENVIRONMENT, CARD, rows, Setting(torch.device("cuda")), True, ["the card is warm"])


def written(tmp_path: Path, *summaries: Any) -> Page:
    """Write summaries to files, and the page of them."""
    paths = []
    for number, found in enumerate(summaries):
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_text(json.dumps(found), encoding="utf-8")
    assert bench_page(paths, tmp_path / "page") == tmp_path / "page/index.html"
    return Page(tmp_path / "page/index.html")


def test_the_page_stands_alone(summary: dict[str, Any], tmp_path: Path) -> None:
    found = written(tmp_path, summary, summary)
    assert [path.name for path in (tmp_path / "page").iterdir()] == ["index.html"]
    tags = {tag for tag, _ in found.tags}
    assert not tags & {"script", "link", "img", "iframe", "image", "object"}
    assert found.all("src") == []
    # Inline styles and handlers would not be applied: the policy allows one text, the style sheet.
    assert found.all("style") == []
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    text = (tmp_path / "page/index.html").read_text(encoding="utf-8")
    [style] = re.findall("<style>(.*?)</style>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert found.all("content")[0] == policy
    assert "url(" not in style
    assert "@import" not in style


def test_references_lead_somewhere_and_ids_are_unique(summary: dict[str, Any], tmp_path: Path) -> None:
    found = written(tmp_path, summary, summary)
    ids = Counter(found.all("id"))
    assert [name for name, count in ids.items() if count > 1] == []
    targets = [link.removeprefix("#") for link in found.all("href")]
    targets += [name for names in found.all("aria-labelledby") for name in names.split()]
    targets += [name.removeprefix("url(#").removesuffix(")") for name in found.all("clip-path")]
    assert set(targets) <= set(ids)
    images = [attributes for tag, attributes in found.tags if tag == "svg"]
    # Per run: floors of two sizes, memory of two sizes, throughput; each for wide and narrow pages.
    assert len(images) == 2 * 5 * 2
    assert {image["role"] for image in images} == {"img"}


def test_all_figures_are_on_the_page(summary: dict[str, Any], tmp_path: Path) -> None:
    text = " ".join(written(tmp_path, summary).text.split())
    for measured in summary["rows"]:
        assert measured["name"] in text
        if measured["unavailable"]:
            assert f"not measured: {measured['unavailable']}" in text
            continue
        for clock in ("device_ms", "wall_ms"):
            low, middle, high = (f"{measured[clock][name]:.4g}" for name in ("low", "median", "high"))
            assert f"{middle} ({low}–{high})" in text  # noqa: RUF001 # an en dash is meant
        assert f"{measured['host_ms']:.4g}" in text
        if measured["share_of_floor"]:  # in the plot
            assert f"{measured['device_ms']['median']:.4g} ms, wall {measured['wall_ms']['median']:.4g}" in text
        assert measured["waits_for_host"] == (True if measured["group"] == "optimizer step" else None)
    for expected in (
        "share of floor",
        "waits for",
        "read p4 g4 m4 v4, write p4 m4 v4",
        "p: parameter, g: gradient",
        "optimizer state, bytes/parameter",
        "peak memory, GB",
        "Doubt: the card is warm",
        "Doubt: 2 of 12 rounds took over 10 times the median",
        "moments travel to the CPU",
        "1.34 billion parameters",
        "124.5 million parameters; 32,768 tokens a step; 850 MFLOP a token, 800 where only the causal half",
        "2900 GB/s",
        "700 TFLOP/s, 71% of the dense peak of 989.4 TFLOP/s",
        "580.1, 13.0",
        "SM 1110 of 1980 MHz",
        "software power cap",
        "Noise floor",
        "one step, at several times of the run, differed by up to",
        "without sparsity. 6 N + 12 L d T FLOPs per token",
        "torch 2.13.0",
        "MFU, causal",
        f"{summary['rows'][7]['mfu']:.1%}",
        f"{summary['rows'][7]['mfu_causal']:.1%}",
    ):
        assert expected in text, expected


def test_a_run_on_the_cpu_is_labelled_and_has_no_memory(summary: dict[str, Any], tmp_path: Path) -> None:
    label = "CPU, small: no figure of this run says anything about a GPU"
    for measured in summary["rows"]:
        measured["peak_allocated"] = 0
    summary |= {"label": label, "complete": False, "quick": True}
    summary["card"] |= {"dense_peak": None, "noise": None}
    found = written(tmp_path, summary)
    assert ("p", {"class": "label"}) in found.tags
    assert f"{label}." in found.text
    assert "dense peak is not known, so there is no MFU" in found.text
    assert {"partial", "quick"} <= set(found.text.split())
    assert "Step time against memory" not in found.text
    assert "Throughput beside other libraries" in found.text


def test_an_older_summary_is_shown(summary: dict[str, Any], tmp_path: Path) -> None:
    for measured in summary["rows"]:
        del measured["mfu_causal"]
    assert "MFU, causal" not in written(tmp_path, summary).text


def test_no_summary_gets_in_as_markup(summary: dict[str, Any], tmp_path: Path) -> None:
    for number, measured in enumerate(summary["rows"]):
        measured["name"] = f"{number} {HOSTILE}"
        measured["doubts"] = [HOSTILE]
        measured["facts"]["note"] = HOSTILE
        measured["unavailable"] = HOSTILE if number == 3 else None
    summary["card"] |= {"name": HOSTILE, "doubts": [HOSTILE]}
    summary["environment"] |= dict.fromkeys(("torch", "clocks", "driver"), HOSTILE)
    summary["label"] = HOSTILE
    summary["rows"].pop(4)
    found = written(tmp_path, summary)
    assert not {tag for tag, _ in found.tags} & {"script", "img"}
    assert HOSTILE in found.text


def test_the_same_summary_gives_the_same_page(summary: dict[str, Any], tmp_path: Path) -> None:
    first = written(tmp_path, summary)
    assert written(tmp_path, summary).tags == first.tags


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda found: found.pop("rows"), "is no summary of the bench"),
        (lambda found: found.update(schema=7), "has schema 7"),
        (lambda found: found.update(rows={}), "has no card or no rows"),
        (lambda found: found["card"].pop("copy_bandwidth"), "has no 'copy_bandwidth' of the card"),
        (lambda found: found["rows"].insert(2, 7), "has a row 3 that is none"),
        (lambda found: found["rows"][1].pop("facts"), "has no 'facts' in row 2"),
        (
            lambda found: found["rows"][1].update(device_ms=None),
            "has no 'device_ms' with median, low and high in row 2",
        ),
        (
            lambda found: found["rows"][1]["wall_ms"].update(low=0),
            "has no 'wall_ms' with median, low and high in row 2",
        ),
        (
            lambda found: found["rows"][1].update(interleaved={"with": "A", "beside_ms": 0.0}),
            "has no 'interleaved' as the bench writes it in row 2",
        ),
    ],
)
def test_a_damaged_summary_is_told_in_a_sentence(
    damage: Callable[[dict[str, Any]], object],
    expected: str,
    summary: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(summary)
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(summary), encoding="utf-8")
    assert main([str(tmp_path), "--out", str(tmp_path / "page")]) == 2
    printed, told = capsys.readouterr()
    assert printed == ""
    assert expected in told
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "page").exists()


def test_the_command_writes_the_page(
    summary: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(summary), encoding="utf-8")
    assert main([str(path), "--out", str(tmp_path / "page")]) == 0
    assert capsys.readouterr().out.rstrip().endswith("page/index.html")
    path.rename(tmp_path / "page/summary.json")
    assert main([str(tmp_path / "page"), "--out", str(tmp_path / "page/summary.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_second_run_on_the_same_card_is_named_by_its_folder(summary: dict[str, Any], tmp_path: Path) -> None:
    folders = [tmp_path / "card", tmp_path / "card/second-host"]
    for folder in folders:
        folder.mkdir()
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    page = bench_page([folders[0], folders[1] / "summary.json"], tmp_path / "page").read_text(encoding="utf-8")
    name = summary["card"]["name"]
    assert re.findall(r'<a href="#run\d">(.*?)</a>', page) == [name, f"{name}: second-host"]


def test_without_matplotlib_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_svg", None)
    assert main(["missing.json", "--out", str(tmp_path / "page")]) == 2
    [sentence] = capsys.readouterr().err.splitlines()
    assert sentence.startswith("The page's plots need matplotlib")
    assert sentence.endswith("pip install 'gpt-conformance[plots]'.")


def test_the_best_stand_first(summary: dict[str, Any]) -> None:
    rows = [found for found in grouped(summary["rows"])["optimizer step", "gpt2-124m"] if not found["unavailable"]]
    names = {found["name"]: found["name"] for found in rows}
    [plot] = plots.draw_all(rows, names, "x")
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", plot.wide)
    order = [text for text in texts if text in names]
    assert order == ["AdamW fused, bf16", "AdamW fused, fp32", "AdamW foreach, fp32", "GrokAdamW, fp32"]
    assert "4 optimizers. The best is AdamW fused, bf16 at 6" in plot.wide


def test_peers_stand_beside_the_reference_with_the_same_settings(summary: dict[str, Any]) -> None:
    rows = grouped(summary["rows"])["training step", "gpt2-124m"]
    assert [found["name"] for found in plots.comparable(rows)] == [
        "reference, bf16-mixed, AdamW fused, compiled",
        "LitGPT, loss in one piece, compiled",
        "transformers GPT2LMHeadModel, compiled",
    ]
    assert plots.comparable(rows[:3]) == []
    names = [found["name"] for found in rows]
    assert plots.shorten(names) == (
        [
            "bf16-mixed, AdamW fused",
            "bf16-mixed, AdamW8bit",
            "bf16-mixed, AdamW fused, eager",
            "LitGPT, loss in one piece",
            "transformers GPT2LMHeadModel",
        ],
        "compiled",
    )
    assert plots.shorten(["one", "two"]) == (["one", "two"], "")


def test_colours_are_classes_that_the_style_sheet_has(tmp_path: Path, summary: dict[str, Any]) -> None:
    found = written(tmp_path, summary)
    # matplotlib draws nothing in a colour of its own, which would be wrong on a dark page.
    assert {value for name in ("fill", "stroke") for value in found.all(name)} <= {"none"}
    used = {name for names in found.all("class") for name in names.split() if name.startswith(("fill-", "stroke-"))}
    style = (tmp_path / "page/index.html").read_text(encoding="utf-8")
    assert used >= {"fill-ink", "fill-dim", "fill-first", "fill-second", "stroke-line"}
    assert all(f".{name} {{" in style for name in used)


def test_rows_of_one_size_stand_together(summary: dict[str, Any]) -> None:
    assert list(grouped(summary["rows"])) == [
        ("optimizer step", "gpt2-124m"),
        ("optimizer step", "llama-1.2b"),
        ("training step", "gpt2-124m"),
        ("training step", "llama-1.2b"),
    ]


def test_the_mfu_with_causal_attention_is_kept() -> None:
    found = training("reference", 0.1)
    assert found["mfu_causal"] == pytest.approx(found["mfu"] * 800 / 850)


def test_a_summary_without_rows_is_an_empty_page(summary: dict[str, Any], tmp_path: Path) -> None:
    summary["rows"] = []
    assert NAME in written(tmp_path, summary).text
