"""A clock that can be trusted: device time, synchronised wall time and the host's work, from the same round.

A GPU works behind the host's back. A kernel launch returns at once, so a stopwatch on the host sees the launch and not
the work: for 5 ms of work ``perf_counter`` says 0.009 ms. Every mark therefore waits for the device, and CUDA events
tell how long the device itself took. pytest-benchmark computes ``timer() - timer()``, so a mark with ``__sub__`` fits
in without any patching.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

import torch

from conformance.errors import ClockError


class Event(Protocol):
    """A point in the device's own time, as ``torch.cuda.Event`` is one."""

    def elapsed_time(self, end: Self, /) -> float:
        """Return the milliseconds of device time from this event to a later one; both have happened."""


class HostEvent:
    """A point in the host's time."""

    def __init__(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: "HostEvent", /) -> float:
        """Return the milliseconds from this event to a later one."""
        return (end.seconds - self.seconds) * 1e3


class Device:
    """What the clock needs of a device. This one is the CPU: it is done before a call returns, and counts no memory."""

    def __init__(self) -> None:
        self.sweep = torch.ones(2**18, dtype=torch.int32)

    def now(self) -> float:
        """Return seconds on the host's clock, from any origin."""
        return time.perf_counter()

    def synchronize(self) -> None:
        """Wait until the device has nothing left to do."""

    def event(self) -> Event:
        """Record an event behind all work launched so far."""
        return HostEvent()

    def delay(self, seconds: float) -> None:
        """Keep the device idle for at least so long before what is launched next. Return at once."""

    def flush(self) -> None:
        """Push everything out of the cache, as the rest of a training step would."""
        self.sweep.bitwise_not_()

    def allocated(self) -> tuple[int, int]:
        """Return the bytes in tensors, and the bytes that the allocator holds for them."""
        return 0, 0

    def peak(self) -> tuple[int, int]:
        """Return the largest of both since :meth:`reset_peak`."""
        return 0, 0

    def reset_peak(self) -> None:
        """Forget the peak. NOTE a footgun: a peak taken over the warm-up shows autotuning, not training."""

    def release(self) -> None:
        """Give the allocator's unused memory back."""


class CudaDevice(Device):
    """The current CUDA device, with the memory that PyTorch's allocator counts."""

    def __init__(self, device: torch.device) -> None:
        torch.cuda.set_device(device)
        # Twice the L2 cache: writing it pushes out everything else. Not zeros, which some caches compress.
        size = 2 * (torch.cuda.get_device_properties(device).L2_cache_size or 64 * 2**20)
        self.sweep = torch.randint(2**31, (size // 4,), dtype=torch.int32, device=device)

    def synchronize(self) -> None:
        torch.cuda.synchronize()  # all streams, not only the current one

    def event(self) -> Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def delay(self, seconds: float) -> None:
        # A kernel of one thread that counts cycles as if the card ran at 3 GHz; none is faster, so most wait longer.
        torch.cuda._sleep(int(seconds * 3e9))  # private, but what PyTorch's own tests delay a stream with

    def allocated(self) -> tuple[int, int]:
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    def peak(self) -> tuple[int, int]:
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def release(self) -> None:
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Round:
    """One measured iteration, in seconds."""

    device: float
    """Between two events. Gaps in which the device waits for launches are in it, unless the host had a lead."""
    wall: float  # on the host, from an idle device to an idle device; a lead is in it
    host: float  # until the Python call returned, while the device may still be busy: what it costs the host


class Mark:
    """A point in time on both clocks. ``end - start`` is the device time in seconds, for pytest-benchmark.

    It has two events because the same call serves as start and as end: the start's second one lies behind its
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
            device=start.event_after.elapsed_time(self.event_before) / 1e3,
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
        """Seconds by which the host gets ahead of the device at the next mark, which uses them up."""

    def mark(self) -> Mark:
        """Wait for the device, and mark the time. pytest-benchmark calls this as its timer."""
        return Mark(self)

    def time(self, step: Callable[[], object]) -> Round:
        """Time one call of ``step``."""
        start = self.mark()
        step()
        end = self.mark()
        end - start
        return self.rounds[-1]


def check_clock(clock: Clock, work: Callable[[int], object]) -> None:
    """Check that the clock waits for the device and sees how much work there is, in one of three tries.

    Args:
        clock: the clock to check.
        work: ``work(n)`` launches n equal pieces of work, of some hundred microseconds each.

    Raises:
        ClockError: if it does not.
    """
    work(10)
    for attempt in (1, 2, 3):  # another process may spoil one
        rounds = [(clock.time(lambda: work(1)), clock.time(lambda: work(10))) for _ in range(5)]
        late = [r for pair in rounds for r in pair if r.wall < 0.95 * r.device]
        if late:
            raise ClockError(
                f"The wall clock shows {late[0].wall * 1e3:.3f} ms for work that took the device "
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
                f"In the last of {attempt} tries, ten times the work took {ratios['device']:.2f} times the device time "
                f"and {ratios['wall']:.2f} times the wall time: either the clock does not see the work, or other "
                "programs keep the device busy."
            )
