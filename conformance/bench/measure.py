"""How one case is measured: warm-up, reset, interleaved rounds, and doubts about what came out."""

import gc
import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import median

import torch
from torch import Tensor

from conformance.bench.case import Case, Prepared, judged_by
from conformance.bench.clock import Clock, Device, Round
from conformance.bench.interleave import Interleaved, lead_for, time_without_gc, waits_for_host

SLOW = 0.5  # seconds of a step against which caches and first launches are small: two calls warm it up
VERY_SLOW = 4.0  # one call does, if it compiled nothing
MOST_WARM_UPS = 20
FROM_IDLE = 10  # rounds at most for wall and host time, of a step whose device time is taken with a lead
SETTLE = 0.3  # seconds of untimed rounds before the timed ones: what ran before heats the card, or lets it idle
OUTLIER = 10.0  # a round that took so many times the median did something else as well


@dataclass
class WarmUp:
    """What the warm-up saw."""

    calls: int = 0
    seconds: float = 0.0  # of the last call
    settled: bool = False  # whether the last calls compiled nothing and took the same time


@dataclass
class Measurement:
    """What came out, in seconds and bytes."""

    rounds: list[Round]  # from an idle device
    ahead: list[Round] = field(default_factory=list)
    """Rounds before which the host got a lead, as it has in training: of them only the device time counts. Empty where
    the wall is judged, where a step takes so long that a lead changes nothing, and where the host cannot get ahead."""
    beside: list[Round] = field(default_factory=list)
    """Of the case that it was interleaved with, from an idle device; with a lead, of a step that takes long."""
    beside_ahead: list[Round] = field(default_factory=list)
    """Of that case, with a lead of its own; interleaved with ``device_rounds``."""
    lead: float = 0.0  # how far the host was ahead, at least
    warm_up: WarmUp = field(default_factory=WarmUp)
    elapsed: float = 0.0  # from before the first round to after the last one, on the host
    compiled: int = 0  # graphs that were compiled during the rounds
    peak_allocated: int = 0  # bytes above what there was before the case was built
    peak_reserved: int | None = 0
    """The same of bytes that the allocator held, where that can be said: see :func:`told_reserved`."""

    @property
    def device_rounds(self) -> list[Round]:
        """Those whose device time counts."""
        return self.ahead or self.rounds

    @property
    def waits_for_host(self) -> bool:
        """Whether waiting for the host is in the device time."""
        return not self.ahead or waits_for_host(self.ahead, self.lead)


# pytest-benchmark's benchmark.pedantic(target, setup=..., teardown=..., rounds=...), whose timer is a Clock's mark.
Pedantic = Callable[..., object]


def compilations() -> int:
    """Return how many graphs torch.compile has compiled in this process so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # imported by whoever compiles; costs seconds otherwise
    if dynamo is None:
        return 0
    # Frames that were looked at, also those that became no graph: each costs time.
    counters = dynamo.counters
    return int(counters["frames"]["total"] + counters["stats"]["unique_graphs"])


@lru_cache(maxsize=1)
def compiler_for(key: Hashable) -> None:
    """Forget all compiled code, unless the last caller had the same key.

    Rows with the same key run the same model on the same shapes, so they share its compiled code, and only the first
    waits for it. Code of other rows must be gone: a second batch size makes TorchDynamo compile for any batch size,
    which is slower; each version adds guards that the host checks at every call; and after eight versions it goes on
    eager with no more than a log line.
    """
    torch._dynamo.reset()


def warm_up(step: Callable[[], object], clock: Clock, most: int = MOST_WARM_UPS) -> WarmUp:
    """Call the step until nothing is compiled or tuned any more: three calls that take the same time, within 10 %."""
    seen = WarmUp()
    recent: list[float] = []
    while seen.calls < most and not seen.settled:
        before = compilations()
        seen.seconds = clock.time(step).wall
        seen.calls += 1
        recent = [] if compilations() > before else [*recent, seen.seconds]
        last = recent[-3:]
        seen.settled = len(last) == 3 and max(last) < 1.1 * min(last)
        if recent and (seen.seconds > VERY_SLOW or (seen.seconds > SLOW and seen.calls > 1)):
            seen.settled = True
    return seen


def choose_rounds(case: Case, seconds: float, most: int) -> int:
    """Return as many rounds as the budget allows, and at least two."""
    return max(2, min(case.rounds, most, int(case.budget / max(seconds, 1e-9))))


def measure(
    case: Case,
    prepared: Prepared,
    clock: Clock,
    pedantic: Pedantic,
    *,
    beside: Prepared | None = None,
    before: tuple[int, int] = (0, 0),
    most: int = 1000,
    most_warm_ups: int = MOST_WARM_UPS,
    settle: float = 0.0,
) -> Measurement:
    """Warm up, reset, and time the step round by round, interleaved with another if there is one.

    A GPU that is idle when a step begins waits for its first kernels, and a host does not launch equally fast at all
    times (conformance.bench.noise). In training the host runs ahead. So where the device time is judged, the GPU is
    kept idle at the start of a round until the host has launched the whole step, as NVBench does; wall and host time
    come from rounds that begin idle. Where the host cannot get ahead, or a step takes so long that a lead changes
    nothing, the device time comes from those, too. The step beside it keeps its lead, as it has one beside any other.

    Args:
        case: what is measured.
        prepared: its step.
        clock: its mark is the timer of ``pedantic``.
        pedantic: runs the rounds.
        beside: the step that is timed before or after each round of this one (A B B A).
        before: bytes allocated and reserved before the case was built.
        most: rounds at most, whatever the case says.
        most_warm_ups: calls of the warm-up at most.
        settle: seconds of untimed rounds before the timed ones, unless a step is slow. After a large matrix product an
            H100 runs at little more than half of its clock for some rounds.

    Raises:
        ValueError: if an input is constant.
    """
    device = clock.device
    check_inputs(prepared.inputs)
    warmed = warm_up(prepared.step, clock, most_warm_ups)
    prepared.reset()
    if warmed.seconds < SLOW:
        prepared.step()  # what the reset freed is created again
    pair = Interleaved(prepared.step, clock, None if beside is None else beside.step, before)
    if beside is not None:
        time_without_gc(pair.other, beside.step)
    started = device.now()
    while warmed.seconds < SLOW and device.now() - started < settle:
        pair.round()
    _, settled = pair.take()
    pair.peaks = [0, 0]
    compiled, started, elapsed = compilations(), device.now(), 0.0
    idle: list[Round] = []
    idle_beside: list[Round] = []
    if judged_by(case.group) == "device":
        if warmed.seconds < SLOW:
            for _ in range(choose_rounds(case, warmed.seconds, min(most, FROM_IDLE))):
                pair.round()
            elapsed = device.now() - started
            idle, idle_beside = pair.take()
            pair.lead_host(idle)
        pair.beside_lead = lead_for(idle_beside or settled)
    rounds = choose_rounds(case, warmed.seconds + 2 * pair.lead, most)
    started = device.now()
    pedantic(prepared.step, setup=pair.setup, teardown=pair.teardown, rounds=rounds)
    timed, timed_beside = pair.take()
    return Measurement(
        rounds=idle if pair.lead else timed,
        ahead=timed if pair.lead else [],
        beside=idle_beside or timed_beside,
        beside_ahead=timed_beside if pair.beside_lead else [],
        lead=pair.lead,
        warm_up=warmed,
        elapsed=elapsed if pair.lead else device.now() - started,
        compiled=compilations() - compiled,
        peak_allocated=pair.peaks[0],
        peak_reserved=told_reserved(pair.peaks, before),
    )


def told_reserved(peaks: Sequence[int], before: tuple[int, int]) -> int | None:
    """Return the peak of the bytes reserved; None where the case beside it hides too much of it.

    The tensors of a case that stays in memory hold segments which are partly free (5 GB in a training step on an H100:
    the moments are created where activations have been). What is put there is reserved already and does not show.
    ``peaks`` are bytes allocated and reserved, above those ``before`` the case was built.
    """
    allocated, reserved = peaks
    hidden = before[1] - before[0]
    return None if reserved < allocated or 8 * hidden > reserved else reserved


def check_inputs(inputs: Sequence[Tensor]) -> None:
    """Raise ValueError if an input is constant.

    Zeros flip no bits, so a GPU draws less power and clocks higher: an A100's matrix product is 15 % faster with them.
    """
    for number, tensor in enumerate(inputs):
        values = tensor.detach().flatten()[:4096]
        if values.numel() > 1 and bool((values == values[0]).all()):
            raise ValueError(f"input {number} of the step is {values[0].item()} throughout: fill it with random data.")


def doubts_about(measurement: Measurement, floor: float | None) -> list[str]:
    """Say why figures should not be believed; ``floor`` is the seconds that the memory alone needs, if known."""
    rounds, found = measurement.rounds, []
    device = median(r.device for r in measurement.device_rounds)
    if any(r.wall < 0.95 * r.device for r in rounds):
        found.append("the wall time is shorter than the device time: the clock did not wait for the device")
    total = sum(r.wall for r in rounds)
    if total > 1.01 * measurement.elapsed:
        found.append(
            f"the rounds add up to {total:.3g} s, but together they took {measurement.elapsed:.3g} s: "
            "a point in time was taken for a duration"
        )
    if floor is not None and device < 0.95 * floor:
        found.append(
            f"{device * 1e3:.3f} ms is less than the {floor * 1e3:.3f} ms that the memory needs: data came from the "
            "cache, or the floor counts too many bytes"
        )
    if measurement.compiled:
        found.append(f"torch.compile compiled {measurement.compiled} times during the rounds")
    for times in ([r.wall for r in rounds], [r.device for r in measurement.ahead]):
        slow = sum(seconds > OUTLIER * median(times) for seconds in times)
        if slow and len(times) >= 3:
            found.append(f"{slow} of {len(times)} rounds took over {OUTLIER:.0f} times the median")
    if not measurement.warm_up.settled:
        found.append(f"the step had not settled after {measurement.warm_up.calls} calls of warm-up")
    return found


def count_bytes(device: Device) -> tuple[int, int]:
    """Return the bytes allocated and reserved, with nothing cached."""
    gc.collect()
    device.synchronize()
    device.release()
    return device.allocated()
