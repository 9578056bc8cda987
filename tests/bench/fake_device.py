"""A device that lags its host, in virtual time: launches return at once, and the work is done later."""

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from conformance.bench.case import Case, Prepared, Setting
from conformance.bench.clock import Clock, Device, Event
from conformance.bench.measure import Measurement, measure


class FakeEvent:
    """A point in the device's time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def elapsed_time(self, end: "FakeEvent", /) -> float:
        return (end.seconds - self.seconds) * 1e3


class FakeDevice(Device):
    """Host and device, each with a time of its own. Nothing takes any real time."""

    launch_seconds = 5e-6
    queue = 1000  # launches that the host can be ahead
    bandwidth, cache_bandwidth, cache_bytes = 1e12, 5e12, 50e6

    def __init__(self, noise: float = 0.0, drift: float = 0.0) -> None:
        self.host = 1000.0  # a host's clock begins anywhere
        self.busy_until = 0.0
        self.noise, self.drift = np.random.default_rng(0), drift
        self.spread = noise
        self.cached = False
        self.tensors, self.peak_tensors = 0, 0
        self.ends: deque[float] = deque(maxlen=self.queue)

    # what a step does

    def work(self, seconds: float) -> None:
        """Launch work of so many seconds; slower by ``drift`` for every second of the device's past."""
        self.host += self.launch_seconds
        if len(self.ends) == self.queue:
            self.host = max(self.host, self.ends[0])
        begin = max(self.host, self.busy_until)
        factor = (1 + self.drift * (begin - 1000.0)) * float(np.exp(self.noise.normal(0.0, self.spread)))
        self.busy_until = begin + seconds * factor
        self.ends.append(self.busy_until)

    def read(self, size: float) -> None:
        """Launch a read of so many bytes of one buffer."""
        warm = self.cached and size <= self.cache_bytes
        self.work(size / (self.cache_bandwidth if warm else self.bandwidth))
        self.cached = True

    def allocate(self, size: int) -> Callable[[], None]:
        """Take bytes; the function gives them back."""
        self.tensors += size
        self.peak_tensors = max(self.tensors, self.peak_tensors)

        def free() -> None:
            self.tensors -= size

        return free

    # what the clock needs

    def now(self) -> float:
        return self.host

    def synchronize(self) -> None:
        self.host = max(self.host, self.busy_until)

    def event(self) -> Event:
        return FakeEvent(max(self.host, self.busy_until))

    def delay(self, seconds: float) -> None:
        self.busy_until = max(self.host, self.busy_until) + 1.5 * seconds  # longer than asked for, as a real one

    def flush(self) -> None:
        self.work(1e-5)
        self.cached = False

    def allocated(self) -> tuple[int, int]:
        return self.tensors, self.tensors

    def peak(self) -> tuple[int, int]:
        return self.peak_tensors, self.peak_tensors

    def reset_peak(self) -> None:
        self.peak_tensors = self.tensors


def never(setting: Setting) -> Prepared:
    raise AssertionError("not built here")


CASE = Case("training step", "size", "name", never, budget=1e9)
BY_DEVICE = replace(CASE, group="optimizer step")  # judged by the device time, so with a lead


def pedantic_with(clock: Clock) -> Callable[..., object]:
    """As pytest-benchmark's, with the clock's mark as its timer."""

    def pedantic(target: Callable[[], object], *, setup: Any, teardown: Any, rounds: int) -> None:
        for _ in range(rounds):
            setup()
            start = clock.mark()
            target()
            clock.mark() - start
            teardown()

    return pedantic


def measured(
    device: FakeDevice,
    step: Callable[[], object],
    case: Case = CASE,
    beside: Callable[[], object] | None = None,
    **keywords: Any,
) -> Measurement:
    """What measure() makes of a step on a fake device."""
    clock = Clock(device)
    other = None if beside is None else Prepared(beside)
    return measure(case, Prepared(step), clock, pedantic_with(clock), beside=other, **keywords)
