"""The card: what it is, what state it is in, and what it can do at most, measured in the same run."""

import importlib.metadata
import re
import subprocess
from collections.abc import Callable

import torch

from conformance.bench.bootstrap import median_interval
from conformance.bench.clock import Clock, check_clock
from conformance.bench.measure import SETTLE, check_inputs
from conformance.bench.models import dense_peak
from conformance.bench.summary import Card
from conformance.report.environment import environment

UNKNOWN = "unknown"
PACKAGES = ("pytest-benchmark", "triton", "torchao", "litgpt", "transformers", "x-transformers")

# Bits of clocks_event_reasons.active: NVML's nvmlClocksEventReasons.
REASONS = {
    0x01: "idle",
    0x02: "application clocks",
    0x04: "software power cap",
    0x08: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clocks",
}


def describe_environment(device: torch.device) -> dict[str, str]:
    """Return versions and machine, and of a GPU also the driver and the CUDA that PyTorch was built for."""
    found = environment()
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["cuda"] = torch.version.cuda or "none"
    if device.type == "cuda":
        found |= {"driver": query(device, "driver_version")[0], "clocks": UNKNOWN, "throttle": UNKNOWN}
    else:
        found |= {"gpu": "none", "driver": "none", "clocks": "none", "throttle": "none"}
    return found


def query(device: torch.device, *fields: str) -> list[str]:
    """Ask nvidia-smi about the device; a field is ``unknown`` where it cannot be asked or does not know."""
    # By UUID: nvidia-smi counts the cards of the machine, PyTorch those of CUDA_VISIBLE_DEVICES.
    which = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", which, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        said = ""
    values = [value.strip() for value in said.strip().split(",")]
    if len(values) != len(fields):  # also of two cards, where one was asked for
        return [UNKNOWN] * len(fields)
    return [UNKNOWN if value in ("", "N/A") or value.startswith("[") else value for value in values]


def describe_load(device: torch.device) -> dict[str, str]:
    """Return clocks, power and temperature in one line, and why the clocks are lower than they could be."""
    fields = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
    # In one question, while the load lasts. Drivers before 535 know the reasons by the second name only.
    for reasons in ("clocks_event_reasons.active", "clocks_throttle_reasons.active"):
        sm, most, memory, power, limit, heat, mask = query(device, *fields, reasons)
        if sm != UNKNOWN:
            clocks = f"SM {sm} of {most} MHz, memory {memory} MHz, {power} of {limit} W, {heat} C"
            return {"clocks": clocks, "throttle": decode_reasons(mask)}
    return {"clocks": UNKNOWN, "throttle": UNKNOWN}


def decode_reasons(mask: str) -> str:
    """Return the reasons in a mask: ``0x0000000000000004`` -> ``software power cap``."""
    try:
        bits = int(mask, 16)
    except ValueError:
        return UNKNOWN
    known = [name for bit, name in REASONS.items() if bits & bit]
    return ", ".join(known) or ("none" if bits == 0 else mask)


def measure_card(clock: Clock, device: torch.device) -> tuple[Card, dict[str, str]]:
    """Check the clock, then measure what the card can do, and its clocks and throttle reasons under that load.

    Raises:
        ClockError: if the clock cannot be trusted on this device.
    """
    small = device.type == "cpu"
    name = "CPU, small" if small else torch.cuda.get_device_name(device)
    side = 256 if small else 8192
    left = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    right = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    # 1 GiB each: twenty times the L2 cache of an H100, so hardly any of it is still there.
    source = torch.randint(-(2**31), 2**31 - 1, (2**20 if small else 2**28,), dtype=torch.int32, device=device)
    check_inputs((left, right, source))
    target, copy = torch.empty_like(left), torch.empty_like(source)

    def multiply(times: int = 1) -> None:
        for _ in range(times):
            torch.mm(left, right, out=target)

    check_clock(clock, multiply)
    load = {}
    if not small:
        multiply(1000)  # some 1.6 s on an H100: the clocks settle, and nvidia-smi sees a card at work
        load = describe_load(device)
    rate = 2 * side**3 / median_seconds(clock, multiply)

    # The product has pulled the clocks down, and a copy needs them, too: 2798 GB/s right after it, 2953 later.
    bandwidth = 2 * source.nbytes / median_seconds(clock, lambda: copy.copy_(source), settle=0.0 if small else SETTLE)
    peak = None if small else dense_peak(name, torch.bfloat16)
    return Card(name, bandwidth, rate, peak), load


def median_seconds(clock: Clock, step: Callable[[], object], rounds: int = 20, settle: float = 0.0) -> float:
    """Return the median device time of a step from a cold cache, after three calls and ``settle`` seconds of them."""
    for _ in range(3):
        step()
    started = clock.device.now()
    while clock.device.now() - started < settle:
        clock.time(step)
    samples = []
    for _ in range(rounds):
        clock.device.flush()
        samples.append(clock.time(step).device)
    return median_interval(samples).median


DRIFT = 0.05  # between the start and the end of a run; a card that keeps its clocks stays within 2 %


def drift_between(start: Card, end: Card) -> list[str]:
    """Say how the card changed during the run; empty if it kept its clocks."""
    return [
        f"the card's {what} went from {before:.4g} to {after:.4g} {unit} during the run: it did not keep its clocks"
        for what, before, after, unit in (
            ("copy bandwidth", start.copy_bandwidth / 1e9, end.copy_bandwidth / 1e9, "GB/s"),
            ("bf16 rate", start.bf16_rate / 1e12, end.bf16_rate / 1e12, "TFLOP/s"),
        )
        if abs(after / before - 1) > DRIFT
    ]


def doubts_about(card: Card) -> list[str]:
    """Say what does not fit together in the card's figures; empty if all does."""
    if card.dense_peak is None:
        return []
    share = card.bf16_rate / card.dense_peak
    if share > 1.02:
        return [f"the card computes {share:.0%} of its dense peak: the peak in the table is too low"]
    # Dense products reach 60 to 95 % of the dense peak, so at most 48 % of one that counts 2:4 sparsity.
    if share < 0.5:
        return [
            f"the card computes only {share:.0%} of its dense peak: either it is throttled, or the peak in the table "
            "is the one with sparsity, which is double"
        ]
    return []


def slug(name: str) -> str:
    """Return a card's name as that of a folder: ``NVIDIA H100 80GB HBM3`` -> ``nvidia-h100-80gb-hbm3``."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
