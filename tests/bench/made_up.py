"""A summary that no GPU gave, with a row of every kind."""

from dataclasses import replace

import numpy as np

from conformance.bench.case import Case, Prepared, Setting
from conformance.bench.clock import Round
from conformance.bench.figures import make_row
from conformance.bench.measure import Measurement, WarmUp
from conformance.bench.summary import Card, Row, Summary, missing, noise_of

NAME = "NVIDIA H100 80GB HBM3"
CARD = Card(NAME, copy_bandwidth=2.9e12, bf16_rate=7.0e14, dense_peak=989.4e12)
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


def row(group: str, size: str, name: str, seconds: float, peak: int, beside: str, **facts: float | str) -> Row:
    """Return a row as a run makes it."""
    generator = np.random.default_rng(0)
    times = [seconds * float(factor) for factor in generator.normal(1.0, 0.01, 12)]
    measured = Measurement(
        rounds=[Round(time, 1.01 * time, 0.5 * time) for time in times],
        ahead=[Round(time, 1.01 * time, 0.5 * time) for time in times],
        beside=[Round(time, time, time) for time in times[::-1]],
        lead=1e9,
        warm_up=WarmUp(3, seconds, settled=True),
        elapsed=1e9,
        peak_allocated=peak,
        peak_reserved=2 * peak,
    )
    return make_row(Case(group, size, name, never, beside=beside or None), measured, facts, CARD)


def optimizer(name: str, seconds: float, size: str = "gpt2-124m", numbers: float = 124.5e6, state: float = 8.0) -> Row:
    """Return the row of an optimizer's step."""
    facts: dict[str, float | str] = {
        "parameters": numbers,
        "parameter dtype": "bfloat16" if "bf16" in name else "float32",
        "floor bytes per parameter": 28.0,
        "floor bytes": 28.0 * numbers,
        "floor arithmetic": "read p4 g4 m4 v4, write p4 m4 v4",
        "state bytes per parameter": state,
    }
    return row("optimizer step", size, name, seconds, 10**9, "AdamW fused, fp32", **facts)


def training(name: str, seconds: float, size: str = "gpt2-124m", beside: str = "", **facts: float | str) -> Row:
    """Return a row of training."""
    known: dict[str, float | str] = {
        "tokens": 32768,
        "parameters": 124.5e6,
        "flops_per_token": 8.5e8,
        "flops_per_token_causal": 8.0e8,
        "formula": "6 N + 12 L d T FLOPs per token",
    }
    return row("training step", size, name, seconds, 16 * 10**9, beside, **(known | facts))


FUSED = "reference, bf16-mixed, AdamW fused, compiled"


def summary() -> Summary:
    """Return a run."""
    slow = optimizer("GrokAdamW, fp32", 0.6, state=12.0)
    torchao = Case("optimizer step", "gpt2-124m", "torchao AdamW8bit, fp32", never)
    foreach = optimizer("AdamW foreach, fp32", 3.9e-3)
    rows = (
        optimizer("AdamW fused, fp32, against itself", 2.0e-3),
        optimizer("AdamW fused, fp32", 2.0e-3),
        replace(foreach, doubts=("2 of 12 rounds took over 10 times the median",)),
        optimizer("AdamW fused, bf16", 1.9e-3, state=4.0),
        replace(optimizer("bitsandbytes AdamW8bit, fp32", 12e-3, state=2.04), waits_for_host=True),
        missing(torchao, "torchao cannot be imported: pip install torchao."),
        replace(slow, facts=slow.facts | {"note": "moments travel to the CPU"}),
        training(FUSED, 0.070),
        training("reference, bf16-mixed, AdamW8bit, compiled", 0.084, beside=FUSED, decays="68.2% of the parameters"),
        training("reference, bf16-mixed, AdamW fused, eager", 0.15),
        optimizer("AdamW fused, fp32", 15e-3, "llama-1.2b", 1.34e9),
        training("reference, bf16-true, AdamW fused, compiled", 0.27, "llama-1.2b", tokens=16384),
        training("LitGPT, loss in one piece, compiled", 0.0691, library="litgpt 0.5.13", note="rotary positions"),
    )
    card = replace(CARD, noise=noise_of(rows), doubts=("the card is warm",))
    return Summary(environment=ENVIRONMENT, card=card, rows=rows)
