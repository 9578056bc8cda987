"""A clock that can be trusted: device time, synchronised wall time and the host's work, from the same round.

A GPU works behind the host's back: a kernel launch returns at once, so a stopwatch on the host sees the launch and not
the work (5 ms of work: 0.009 ms on ``perf_counter``). Every mark therefore waits for the device, and CUDA events tell
how long the device itself took. pytest-benchmark computes ``timer() - timer()``, so a mark with ``__sub__`` fits in
without any patching.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class ClockError(Exception):
    """The clock cannot be trusted on this device; nothing that it measures should be believed."""


class Event(Protocol):
    """A point in the device's own time."""

    def seconds_until(self, later: Any) -> float:
        """Seconds of device time from this event to a later one; both have happened."""


class Device(Protocol):
    """What the clock needs of a device. The tests have one that lags the host in virtual time."""

    kind: str
    """``cuda``, ``cpu``, ..."""

    def now(self) -> float:
        """Seconds on the host's clock, from any origin."""

    def synchronize(self) -> None:
        """Wait until the device has nothing left to do."""

    def event(self) -> Event:
        """An event recorded behind all work launched so far."""

    def delay(self, seconds: float) -> None:
        """Give the device nothing to do for at least so long, before what is launched next. Returns at once."""

    def flush(self) -> None:
        """Push everything out of the cache, as the rest of a training step would."""

    def allocated(self) -> tuple[int, int]:
        """Bytes in tensors, and bytes that the allocator holds for them."""

    def peak(self) -> tuple[int, int]:
        """The largest of both since :meth:`reset_peak`."""

    def reset_peak(self) -> None:
        """Forget the peak. NOTE a footgun: a peak taken over the warm-up shows autotuning, not training."""

    def release(self) -> None:
        """Give the allocator's unused memory back."""


class CudaEvent:
    """An event with timing on the current stream."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def seconds_until(self, later: "CudaEvent") -> float:
        """From this event to a later one."""
        return self.event.elapsed_time(later.event) / 1e3


class CudaDevice:
    """The current CUDA device."""

    kind = "cuda"

    def __init__(self, device: torch.device) -> None:
        torch.cuda.set_device(device)
        # Twice the L2 cache: to write it pushes out everything else. Not zeros, which some caches compress.
        size = 2 * (torch.cuda.get_device_properties(device).L2_cache_size or 64 * 2**20)
        self.sweep = torch.randint(2**31, (size // 4,), dtype=torch.int32, device=device)

    def now(self) -> float:
        """Of ``perf_counter``."""
        return time.perf_counter()

    def synchronize(self) -> None:
        """All streams, not only the current one."""
        torch.cuda.synchronize()

    def event(self) -> CudaEvent:
        """On the current stream."""
        return CudaEvent()

    def delay(self, seconds: float) -> None:
        """A kernel of one thread that counts cycles, as if the card ran at 3 GHz: none is faster, most wait longer."""
        torch.cuda._sleep(int(seconds * 3e9))  # private, but what PyTorch's own tests delay a stream with

    def flush(self) -> None:
        """Read and write twice the size of the L2 cache."""
        self.sweep.bitwise_not_()

    def allocated(self) -> tuple[int, int]:
        """As PyTorch's allocator counts."""
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    def peak(self) -> tuple[int, int]:
        """As PyTorch's allocator counts."""
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()

    def reset_peak(self) -> None:
        """Of PyTorch's allocator."""
        torch.cuda.reset_peak_memory_stats()

    def release(self) -> None:
        """To the driver."""
        torch.cuda.empty_cache()


class HostEvent:
    """A point in the host's time."""

    def __init__(self) -> None:
        self.seconds = time.perf_counter()

    def seconds_until(self, later: "HostEvent") -> float:
        """From this event to a later one."""
        return later.seconds - self.seconds


class HostDevice:
    """The CPU, which is done before it returns: all three times are the same. Memory is not counted."""

    kind = "cpu"

    def __init__(self) -> None:
        self.sweep = torch.ones(2**18, dtype=torch.int32)

    def now(self) -> float:
        """Of ``perf_counter``."""
        return time.perf_counter()

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def event(self) -> HostEvent:
        """Now."""
        return HostEvent()

    def delay(self, seconds: float) -> None:
        """Nothing can be ahead of a device that is the host."""

    def flush(self) -> None:
        """Only so that the CPU runs the same code."""
        self.sweep.bitwise_not_()

    def allocated(self) -> tuple[int, int]:
        """Not counted."""
        return 0, 0

    def peak(self) -> tuple[int, int]:
        """Not counted."""
        return 0, 0

    def reset_peak(self) -> None:
        """Nothing to forget."""

    def release(self) -> None:
        """Nothing to give back."""


@dataclass(frozen=True)
class Round:
    """One measured iteration, in seconds."""

    device: float
    """Between two events. Gaps in which the device waits for launches are in it, unless the host had a lead."""
    wall: float
    """On the host, from an idle device to an idle device; a lead is in it."""
    host: float
    """Until the Python call returned, while the device may still be busy: what it costs the host."""


class Mark:
    """A point in time on both clocks. ``end - start`` is the device time in seconds, for pytest-benchmark.

    Two events, because the same call must serve as start and as end: the start's second one lies behind its
    synchronisation, the end's first one before it. Nothing but the measured work lies between those.
    """

    __slots__ = ("clock", "entered", "event_after", "event_before", "left", "synchronised")

    def __init__(self, clock: "Clock") -> None:
        device = clock.device
        self.clock = clock
        self.entered = device.now()
        self.event_before = device.event()
        device.synchronize()
        self.synchronised = device.now()
        if clock.lead:
            device.delay(clock.lead)
            clock.lead = 0.0
        self.event_after = device.event()
        self.left = device.now()

    def __sub__(self, start: "Mark") -> float:
        measured = Round(
            device=start.event_after.seconds_until(self.event_before),
            wall=self.synchronised - start.synchronised,
            host=self.entered - start.left,
        )
        self.clock.rounds.append(measured)
        return measured.device


class Clock:
    """Gives marks, and keeps every round that was measured between two of them."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.rounds: list[Round] = []
        self.lead = 0.0
        """Seconds by which the host is ahead of the device at the next mark. The mark uses it up."""

    def mark(self) -> Mark:
        """Wait for the device, and mark the time. This is the timer that pytest-benchmark calls."""
        return Mark(self)

    def time(self, step: Callable[[], object]) -> Round:
        """One call of ``step``, timed."""
        start = self.mark()
        step()
        end = self.mark()
        end - start
        return self.rounds[-1]


def check_clock(clock: Clock, work: Callable[[int], object]) -> None:
    """Raise ClockError unless the clock waits for the device and sees how much work there is, in one of three tries.

    Args:
        clock: the clock to check.
        work: ``work(n)`` launches n equal pieces of work, of some hundred microseconds each.
    """
    work(10)
    for attempt in (1, 2, 3):  # another process may spoil one
        rounds = [(clock.time(lambda: work(1)), clock.time(lambda: work(10))) for _ in range(5)]
        late = [r for pair in rounds for r in pair if r.wall < 0.95 * r.device]
        if late:
            raise ClockError(
                f"The wall clock says {late[0].wall * 1e3:.3f} ms for what took the device "
                f"{late[0].device * 1e3:.3f} ms: it does not wait for the device."
            )
        ratios = {
            name: min(getattr(ten, name) for _, ten in rounds) / max(min(getattr(one, name) for one, _ in rounds), 1e-9)
            for name in ("device", "wall")
        }
        if all(4 < ratio < 25 for ratio in ratios.values()):
            return
        if attempt == 3:
            raise ClockError(
                f"Ten times the work took {ratios['device']:.2f} times the device time and {ratios['wall']:.2f} times "
                f"the wall time, in the last of {attempt} tries: the clock does not see the work, or other programs "
                "keep the device busy."
            )
