"""The bench's clock and what it does about figures that cannot be: one planted fault for each."""

import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from conformance.bench.case import Prepared
from conformance.bench.clock import Clock, Device, Mark, Round, check_clock
from conformance.bench.measure import Measurement, check_inputs, doubts_about, measure, warm_up
from conformance.errors import ClockError
from tests.bench.fake_device import BY_DEVICE, CASE, FakeDevice, measured, pedantic_with


def some_work(device: FakeDevice) -> Callable[[int], object]:
    """Launches so many pieces of work."""

    def work(times: int) -> None:
        for _ in range(times):
            device.work(5e-4)

    return work


def test_device_wall_and_host_time_come_from_the_same_round() -> None:
    device = FakeDevice()
    one = Clock(device).time(lambda: device.work(5e-3))
    assert one.device == pytest.approx(5e-3 + device.launch_seconds)  # the gap until the launch is in it
    assert one.wall == pytest.approx(one.device)
    assert one.host == pytest.approx(device.launch_seconds)


def test_a_mark_minus_a_mark_is_what_pytest_benchmark_keeps() -> None:
    device = FakeDevice()
    clock = Clock(device)
    start = clock.mark()
    device.work(1e-3)
    assert clock.mark() - start == clock.rounds[0].device


def test_the_host_is_a_device_without_a_lag() -> None:
    device = Device()
    one = Clock(device).time(lambda: sum(range(10_000)))
    assert 0 < one.host <= one.wall
    assert device.allocated() == device.peak() == (0, 0)
    device.flush()
    device.release()


def test_a_healthy_clock_is_trusted() -> None:
    device = FakeDevice(noise=0.02)
    check_clock(Clock(device), some_work(device))
    found = measured(device, lambda: device.work(1e-3))
    assert len(found.rounds) == CASE.rounds
    assert found.warm_up.settled
    assert doubts_about(found, floor=0.98e-3) == []


class Unsynchronised(FakeDevice):
    """Its synchronisation does not wait."""

    def synchronize(self) -> None:
        pass


def test_a_missing_synchronisation_is_caught() -> None:
    device = Unsynchronised()
    with pytest.raises(ClockError, match="does not wait for the device"):
        check_clock(Clock(device), some_work(device))
    for case in (CASE, BY_DEVICE):
        [doubt] = doubts_about(measured(device, lambda: device.work(1e-3), case), floor=None)
        assert "did not wait for the device" in doubt


def test_a_clock_that_does_not_see_the_work_is_caught() -> None:
    device = FakeDevice()
    with pytest.raises(ClockError, match="In the last of 3 tries, ten times the work took"):
        check_clock(Clock(device), {1: None, 10: None}.get)


@pytest.mark.parametrize(("spoilt", "trusted"), [(1, True), (2, True), (3, False)])
def test_the_clock_is_tried_three_times(spoilt: int, trusted: bool) -> None:
    device, ones = FakeDevice(), 0

    def work(times: int) -> None:
        nonlocal ones
        ones += times == 1
        busy = times == 1 and ones <= 5 * spoilt  # another program has the device
        device.work(5e-4 * times + (0.05 if busy else 0.0))

    if trusted:
        check_clock(Clock(device), work)
    else:
        with pytest.raises(ClockError, match=r"0\.10 times the device time"):
            check_clock(Clock(device), work)
    assert ones == 5 * min(spoilt + 1, 3)


def test_a_warm_cache_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()
    floor = 10e6 / device.bandwidth
    assert doubts_about(measured(device, lambda: device.read(10e6)), floor) == []
    monkeypatch.setattr(device, "flush", lambda: None)
    [doubt] = doubts_about(measured(device, lambda: device.read(10e6)), floor)
    assert "data came from the cache" in doubt


def test_constant_inputs_are_caught() -> None:
    random = torch.randn(8, generator=torch.Generator().manual_seed(0))
    check_inputs([random, torch.zeros(1)])  # a step count is one number
    device = FakeDevice()
    clock = Clock(device)
    with pytest.raises(ValueError, match=r"input 1 of the step is 0\.0 throughout"):
        measure(CASE, Prepared(lambda: device.work(1e-3), inputs=[random, torch.zeros(8)]), clock, pedantic_with(clock))
    assert clock.rounds == []


def test_a_compilation_inside_the_timed_region_is_caught() -> None:
    device, calls = FakeDevice(), 0

    @torch.compile(backend="eager", dynamic=False)
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    def step() -> None:
        nonlocal calls
        calls += 1
        double(torch.ones(2 if calls < 10 else 3))
        device.work(1e-3)

    found = measured(device, step)
    torch._dynamo.reset()
    assert found.compiled >= 1
    assert any("compiled" in doubt for doubt in doubts_about(found, None))


def test_a_round_that_did_something_else_is_caught() -> None:
    device, calls = FakeDevice(), 0

    def step() -> None:
        nonlocal calls
        calls += 1
        device.work(1.0 if calls == 10 else 1e-3)

    [doubt] = doubts_about(measured(device, step), None)
    assert doubt == "1 of 30 rounds took over 10 times the median"


def test_a_start_taken_for_a_duration_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()
    difference = Mark.__sub__

    def wrong(self: Mark, start: Mark) -> float:
        seconds = difference(self, start)
        self.clock.rounds[-1] = replace(self.clock.rounds[-1], wall=start.synchronised)
        return seconds

    monkeypatch.setattr(Mark, "__sub__", wrong)
    doubts = doubts_about(measured(device, lambda: device.work(1e-3)), None)
    assert any("a point in time was taken for a duration" in doubt for doubt in doubts)


def test_the_warm_up_lasts_until_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    counters = {"frames": {"total": 0}, "stats": {"unique_graphs": 0}}
    monkeypatch.setitem(sys.modules, "torch._dynamo.utils", SimpleNamespace(counters=counters))
    device, calls = FakeDevice(), 0

    def step() -> None:
        nonlocal calls
        calls += 1
        counters["stats"]["unique_graphs"] += calls in (1, 4)
        device.work(1e-3)

    assert warm_up(step, Clock(device)).calls == 3 + 4  # three after the last compilation
    assert warm_up(lambda: device.work(1e-3), Clock(device)).calls == 3


def test_slow_steps_are_warmed_up_by_few_calls() -> None:
    device = FakeDevice()
    assert warm_up(lambda: device.work(2.0), Clock(device)).calls == 2
    assert warm_up(lambda: device.work(9.0), Clock(device)).calls == 1


def test_a_step_that_never_settles_is_doubted() -> None:
    device, seconds = FakeDevice(), 1e-3

    def step() -> None:
        nonlocal seconds
        seconds *= 1.2
        device.work(seconds)

    warmed = warm_up(step, Clock(device))
    assert (warmed.calls, warmed.settled) == (20, False)
    doubts = doubts_about(Measurement([Round(1.0, 1.0, 1.0)], warm_up=warmed, elapsed=2.0), None)
    assert doubts == ["the step had not settled after 20 calls of warm-up"]


def test_the_model_is_reset_after_the_warm_up() -> None:
    device, log = FakeDevice(), []

    def step() -> None:
        log.append("step")
        device.work(1e-3)

    clock = Clock(device)
    prepared = Prepared(step, reset=lambda: log.append("reset"))
    measure(replace(CASE, rounds=2), prepared, clock, pedantic_with(clock))
    assert log == ["step"] * 3 + ["reset"] + ["step"] * 3  # one of them not timed


class Segmented(FakeDevice):
    """Reserves a quarter more than it gives, and holds some that it does not."""

    hidden = 0

    def peak(self) -> tuple[int, int]:
        return self.peak_tensors, self.peak_tensors * 5 // 4


@pytest.mark.parametrize(("hidden", "expected"), [(0, 1000), (100, 900), (130, None), (400, None)])
def test_what_another_row_hides_of_the_reserved_memory(hidden: int, expected: int | None) -> None:
    """Segments that another one's tensors keep half empty are used without being reserved again."""
    device = Segmented()
    device.allocate(800)
    # What is hidden was reserved before, and is not reserved now.
    found = measured(device, lambda: device.work(1e-3), before=(0, hidden))
    assert found.peak_allocated == 800
    assert found.peak_reserved == expected


def test_settling_is_not_timed_and_not_done_with_slow_steps() -> None:
    device, calls = FakeDevice(), 0

    def step(seconds: float) -> Callable[[], None]:
        def run() -> None:
            nonlocal calls
            calls += 1
            device.work(seconds)

        return run

    clock = Clock(device)
    case = replace(CASE, rounds=4)
    found = measure(case, Prepared(step(1e-2)), clock, pedantic_with(clock), settle=0.1)
    assert (len(found.rounds), calls) == (4, 3 + 1 + 9 + 4)  # the device is late by one
    calls = 0
    found = measure(case, Prepared(step(2.0)), clock, pedantic_with(clock), settle=9.0)
    assert (len(found.rounds), calls) == (4, 2 + 4)


def test_the_peak_is_that_of_the_rounds_above_what_was_there() -> None:
    device = FakeDevice()
    device.allocate(1000)  # somebody else's
    before = device.allocated()
    device.allocate(50)
    first = True

    def step() -> None:
        nonlocal first
        free = device.allocate(700 if first else 20)  # autotuning takes more
        first = False
        device.work(1e-3)
        free()

    found = measured(device, step, before=before)
    assert found.peak_allocated == found.peak_reserved == 70


def test_rounds_fit_the_budget() -> None:
    device = FakeDevice()
    clock = Clock(device)
    for budget, rounds in ((0.01, 9), (1e-9, 2), (1e9, CASE.rounds)):
        case = replace(CASE, budget=budget)
        found = measure(case, Prepared(lambda: device.work(1e-3)), clock, pedantic_with(clock))
        assert len(found.rounds) == rounds
