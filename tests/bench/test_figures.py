"""Rows from measurements: tokens per second and MFU by hand, and figures that cannot be."""

from dataclasses import replace

import pytest

from conformance.bench.bootstrap import Interval
from conformance.bench.figures import with_throughput
from conformance.bench.summary import Card, Row, Samples, missing
from tests.bench.fake_device import CASE

H100 = Card("NVIDIA H100 80GB HBM3", copy_bandwidth=2.9e12, bf16_rate=7e14, dense_peak=989.4e12)


def row(wall: float = 100.0, device: float = 99.0, host: float = 20.0, **facts: float | str) -> Row:
    """Return a row of 32 x 1024 tokens of GPT-2 in 100 ms."""
    known: dict[str, float | str] = {"tokens": 32768, "flops_per_token": 8.5e8, "flops_per_token_causal": 8.0e8}
    return Row(
        group="training step",
        size="gpt2-124m",
        name="reference",
        device_ms=Interval(device, device, device),
        wall_ms=Interval(wall, wall, wall),
        host_ms=host,
        facts=known | facts,
        samples_ms=Samples((device,), (wall,)),
    )


def test_throughput_by_hand() -> None:
    found = with_throughput(row(), H100)
    assert found.tokens_per_second == pytest.approx(327_680)
    assert found.mfu == pytest.approx(327_680 * 8.5e8 / 989.4e12)  # 28.2 %
    assert found.mfu_causal == pytest.approx(327_680 * 8.0e8 / 989.4e12)


def test_no_mfu_without_a_peak_and_nothing_without_a_measurement() -> None:
    unknown = with_throughput(row(), replace(H100, dense_peak=None))
    assert unknown.tokens_per_second == pytest.approx(327_680)
    assert unknown.mfu is unknown.mfu_causal is None
    absent = missing(CASE, "bitsandbytes is not installed.")
    assert with_throughput(absent, H100) == absent


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (row(wall=1.0, device=0.9, host=0.2), r"MFU of 28.15 is more than the card can do"),
        (row(wall=1.7e12), "is not a duration, perhaps a timestamp"),  # of time.time(), in milliseconds
        (row(device=1.7e12), "is not a duration"),
        (row(wall=0.01), "is not a duration"),  # of a clock that did not wait for the device
        (row(device=0.0), "is not a duration"),
        (row(tokens=32768 * 1024), "a count is wrong"),
    ],
)
def test_impossible_figures_are_refused(fault: Row, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_throughput(fault, H100)
