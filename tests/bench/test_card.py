"""What the bench knows of the card."""

import importlib.metadata
import subprocess
from dataclasses import replace
from typing import Any

import pytest
import torch

from conformance.bench import card
from conformance.bench.card import (
    UNKNOWN,
    decode_reasons,
    describe_environment,
    describe_load,
    doubts_about,
    drift_between,
    measure_card,
    median_seconds,
    query,
    slug,
)
from conformance.bench.clock import Clock, Device
from conformance.bench.summary import Card
from tests.bench.fake_device import FakeDevice

H100 = Card("NVIDIA H100 80GB HBM3", copy_bandwidth=3.0e12, bf16_rate=7.0e14, dense_peak=989.4e12)
CUDA = torch.device("cuda", 0)


def test_a_sparse_peak_is_caught() -> None:
    assert doubts_about(H100) == []
    [doubt] = doubts_about(replace(H100, dense_peak=1979e12))
    assert "the one with sparsity" in doubt
    [doubt] = doubts_about(replace(H100, dense_peak=600e12))
    assert "too low" in doubt
    assert doubts_about(replace(H100, dense_peak=None)) == []


def test_a_card_that_did_not_keep_its_clocks_is_told() -> None:
    assert drift_between(H100, replace(H100, copy_bandwidth=2.95e12)) == []
    [told] = drift_between(H100, replace(H100, bf16_rate=6.0e14))
    assert told.startswith("the card's bf16 rate went from 700 to 600 TFLOP/s during the run")


def test_the_cpu_is_measured_with_the_same_code() -> None:
    found, load = measure_card(Clock(Device()), torch.device("cpu"))
    assert (found.name, found.dense_peak, load) == ("CPU, small", None, {})
    assert found.copy_bandwidth > 0
    assert found.bf16_rate > 0


def test_rates_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "median_seconds", lambda *_, **__: 0.5)
    found, _ = measure_card(Clock(Device()), torch.device("cpu"))
    assert found.bf16_rate == 2 * 256**3 / 0.5  # a product and a sum for each
    assert found.copy_bandwidth == 2 * 4 * 2**20 / 0.5  # read and written


@pytest.mark.parametrize("function", ["randn", "randint"])
def test_a_card_is_not_measured_with_zeros(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    original = getattr(torch, function)
    monkeypatch.setattr(torch, function, lambda *size, **keywords: original(*size, **keywords).zero_())
    with pytest.raises(ValueError, match="throughout: fill it with random data"):
        measure_card(Clock(Device()), torch.device("cpu"))


def test_the_card_is_measured_from_a_cold_cache() -> None:
    device = FakeDevice()
    seconds = median_seconds(Clock(device), lambda: device.read(40e6))
    assert seconds == pytest.approx(40e6 / device.bandwidth + device.launch_seconds)


def test_the_environment_names_versions_and_gpu() -> None:
    found = describe_environment(torch.device("cpu"))
    assert found["torch"] == importlib.metadata.version("torch")
    assert found["pytest-benchmark"] != "not installed"
    assert found["gpu"] == found["driver"] == "none"


class Properties:
    uuid = "3a8e24c1-0000-0000-0000-000000000000"


def answer_with(monkeypatch: pytest.MonkeyPatch, answers: dict[str, str]) -> list[list[str]]:
    """Have nvidia-smi answer a list of fields, and fail on any other; the commands."""
    commands: list[list[str]] = []

    def run(command: list[str], **keywords: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        fields = command[2].removeprefix("--query-gpu=")
        if fields not in answers:
            raise subprocess.CalledProcessError(2, command)
        return subprocess.CompletedProcess(command, 0, stdout=answers[fields])

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "get_device_properties", {CUDA: Properties}.get)
    return commands


def test_nvidia_smi_is_asked_about_this_card(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = answer_with(monkeypatch, {"driver_version": "570.86.15\n"})
    assert query(CUDA, "driver_version") == ["570.86.15"]
    assert commands[0][1] == f"--id=GPU-{Properties.uuid}"
    assert query(CUDA, "clocks.sm") == [UNKNOWN]


def test_without_nvidia_smi_all_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(torch.cuda, "get_device_properties", {CUDA: Properties}.get)
    assert query(CUDA, "driver_version") == [UNKNOWN]
    assert describe_load(CUDA) == {"clocks": UNKNOWN, "throttle": UNKNOWN}


@pytest.mark.parametrize("reasons", ["clocks_event_reasons.active", "clocks_throttle_reasons.active"])
def test_clocks_and_throttle_reasons_of_new_and_old_drivers(monkeypatch: pytest.MonkeyPatch, reasons: str) -> None:
    fields = f"clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu,{reasons}"
    answer_with(monkeypatch, {fields: "1755, 1980, 2619, 698.12, 700.00, 61, 0x0000000000000004\n"})
    assert describe_load(CUDA) == {
        "clocks": "SM 1755 of 1980 MHz, memory 2619 MHz, 698.12 of 700.00 W, 61 C",
        "throttle": "software power cap",
    }


def test_answers_of_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, {"a,b": "1980, [N/A]\n", "c,d": "1980\n1980\n"})
    assert query(CUDA, "a", "b") == ["1980", UNKNOWN]
    assert query(CUDA, "c", "d") == [UNKNOWN, UNKNOWN]  # of two cards
    assert decode_reasons("0x0000000000000000") == "none"
    assert decode_reasons("0x0000000000000048") == "hardware slowdown, hardware thermal slowdown"
    assert decode_reasons("0x0000000000100000") == "0x0000000000100000"
    assert decode_reasons("Not Active") == UNKNOWN


def test_a_folder_is_named_after_the_card() -> None:
    assert slug(H100.name) == "nvidia-h100-80gb-hbm3"
