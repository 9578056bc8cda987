"""The bench's clock and what it does about figures that cannot be: one planted fault for each."""

import gc
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conformance.bench.bootstrap import paired_ratio, verdict
from conformance.bench.case import Case, Prepared, Setting
from conformance.bench.clock import Clock, ClockError, HostDevice, Mark, Round, check_clock
from conformance.bench.measure import Measurement, check_inputs, doubts_about, measure, warm_up
from tests.fake_device import FakeDevice


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


def some_work(device: FakeDevice) -> Callable[[int], object]:
    """Launches so many pieces of work."""

    def work(times: int) -> None:
        for _ in range(times):
            device.work(5e-4)

    return work


def measured(
    device: FakeDevice,
    step: Callable[[], object],
    case: Case = CASE,
    beside: Callable[[], object] | None = None,
    **keywords: Any,
) -> Measurement:
    clock = Clock(device)
    other = None if beside is None else Prepared(beside)
    return measure(case, Prepared(step), clock, pedantic_with(clock), beside=other, **keywords)


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
    device = HostDevice()
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
    with pytest.raises(ClockError, match=r"Ten times the work took .*, in the last of 3 tries"):
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


def test_rounds_are_interleaved_so_that_drift_cancels() -> None:
    # The card gets 50 % slower in the course of the rounds; the step takes 2 % longer than the one beside it.
    device = FakeDevice(noise=0.005, drift=8.0)
    order: list[str] = []

    def step(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            device.work(seconds)

        return run

    clock = Clock(device)
    prepared, beside = Prepared(step("B", 1.02e-3)), Prepared(step("A", 1e-3))
    found = measure(CASE, prepared, clock, pedantic_with(clock), beside=beside)
    assert "".join(order).endswith("ABBAABBAABBA")
    ratio = paired_ratio([r.device for r in found.rounds], [r.device for r in found.beside])
    assert ratio.low < 1.02 < ratio.high
    assert ratio.high - ratio.low < 0.02
    assert verdict(ratio, noise=0.005, rounds=len(found.rounds)) == "slower"


class Ramping(FakeDevice):
    """At half of its speed at the start, and at nearly all of it 0.1 s later."""

    def work(self, seconds: float) -> None:
        begin = max(self.host, self.busy_until) - 1000.0
        super().work(seconds * (1 + math.exp(-begin / 0.02)))


@pytest.mark.parametrize("settle", [0.0, 0.3])
def test_a_step_against_itself_takes_its_own_time_while_the_card_ramps_up(settle: float) -> None:
    device = Ramping(noise=0.003)
    clock = Clock(device)
    same = Prepared(lambda: device.work(1e-3))
    found = measure(CASE, same, clock, pedantic_with(clock), beside=same, settle=settle)
    assert len(found.rounds) == len(found.beside) == CASE.rounds
    ratio = paired_ratio([r.device for r in found.rounds], [r.device for r in found.beside])
    assert ratio.low < 1 < ratio.high
    assert abs(ratio.median - 1) < 0.003
    # The first rounds are as fast as the others only where the card had time to settle.
    assert (found.rounds[0].device < 1.02e-3) == (settle > 0)


class Remembering(FakeDevice):
    """Faster by 3 % for who synchronised and looked at the memory just before, as a host with warm caches is."""

    def __init__(self) -> None:
        super().__init__(noise=0.003)
        self.warm = False

    def reset_peak(self) -> None:
        super().reset_peak()
        self.warm = True

    def work(self, seconds: float) -> None:
        super().work(seconds * (0.97 if self.warm else 1.0))
        self.warm = False


def test_both_sides_of_a_ratio_begin_alike() -> None:
    device = Remembering()
    clock = Clock(device)
    same = Prepared(lambda: device.work(1e-3))
    found = measure(CASE, same, clock, pedantic_with(clock), beside=same)
    ratio = paired_ratio([r.device for r in found.rounds], [r.device for r in found.beside])
    assert ratio.low < 1 < ratio.high


def test_garbage_is_collected_on_neither_side() -> None:
    device, enabled = FakeDevice(), []

    def step() -> None:
        enabled.append(gc.isenabled())
        device.work(1e-3)

    clock = Clock(device)
    warm = Prepared(lambda: device.work(1e-3))
    measure(replace(CASE, rounds=2), warm, clock, pedantic_with(clock), beside=Prepared(step))
    assert enabled == [False] * 3
    assert gc.isenabled()


def test_a_round_begins_on_an_idle_device() -> None:
    busy: list[bool] = []

    class Watched(FakeDevice):
        def reset_peak(self) -> None:
            busy.append(self.busy_until > self.host)
            super().reset_peak()

    device = Watched()
    clock = Clock(device)

    def step() -> None:
        busy.append(device.busy_until > device.host)
        device.work(1e-3)

    measure(replace(CASE, rounds=2), Prepared(step), clock, pedantic_with(clock))
    assert not any(busy)


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
    assert (len(found.rounds), calls) == (4, 3 + 10 + 4)
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


# --- with a lead of the host, where the device time is judged --------------------------------------------------------


def launches(device: FakeDevice, kernels: int, seconds: float) -> Callable[[], None]:
    """A step of so many kernels, of so many seconds in all."""

    def step() -> None:
        for _ in range(kernels):
            device.work(seconds / kernels)

    return step


@pytest.mark.parametrize("launch_seconds", [5e-6, 5e-5])
def test_the_device_time_is_that_of_the_device_however_slow_the_host_launches(launch_seconds: float) -> None:
    device = FakeDevice()
    device.launch_seconds = launch_seconds
    found = measured(device, launches(device, 20, 1e-3), BY_DEVICE, beside=launches(device, 1, 1e-3))
    assert [r.device for r in found.device_rounds] == pytest.approx([1e-3] * CASE.rounds)
    assert [r.device for r in found.beside_ahead] == pytest.approx([1e-3] * CASE.rounds)
    assert not found.waits_for_host
    # The wall begins idle, so it has the gaps: before the first kernel, or with slow launches before each.
    expected = max(1e-3 + launch_seconds, 20 * launch_seconds + 1e-3 / 20)
    assert [r.wall for r in found.rounds] == pytest.approx([expected] * 10)
    assert [r.host for r in found.rounds] == pytest.approx([20 * launch_seconds] * 10)
    assert len(found.beside) == 10
    assert doubts_about(found, floor=1e-3) == []


def test_a_step_that_waits_for_the_device_is_told_from_one_that_does_not() -> None:
    """As an optimizer that synchronises after every parameter: the host can never be ahead of it."""
    device = FakeDevice()

    def step() -> None:
        for _ in range(4):
            device.host += 1e-3  # what the host does for each parameter
            device.work(1e-4)
            device.synchronize()

    found = measured(device, step, BY_DEVICE, beside=launches(device, 20, 1e-3))
    assert (found.waits_for_host, found.ahead, found.lead) == (True, [], 0.0)
    # All from an idle device, so that the waiting shows and the wall is never shorter.
    assert [r.device for r in found.device_rounds] == pytest.approx([4e-3 + 4e-4] * CASE.rounds, rel=0.02)
    assert [r.wall for r in found.rounds] == pytest.approx([4e-3 + 4e-4] * CASE.rounds, rel=0.02)
    assert [r.device for r in found.beside_ahead] == pytest.approx([1e-3] * CASE.rounds)
    assert len(found.beside) == 10
    assert doubts_about(found, None) == []


def test_a_host_that_loses_its_lead_later_is_told() -> None:
    device = FakeDevice()
    calls = 0

    def step() -> None:
        nonlocal calls
        calls += 1
        device.host += 2e-2 if calls > 30 else 0.0
        device.work(1e-3)

    found = measured(device, step, BY_DEVICE)
    assert len(found.ahead) == CASE.rounds
    assert found.waits_for_host


@pytest.mark.parametrize(("kernel", "waits"), [(2e-5, False), (2e-6, True)])
def test_a_full_queue_of_launches_is_no_waiting_unless_the_device_is_the_faster_one(kernel: float, waits: bool) -> None:
    device = FakeDevice()  # 5 us per launch
    found = measured(device, launches(device, 2000, 2000 * kernel), BY_DEVICE)
    assert found.waits_for_host == waits
    expected = 2000 * device.launch_seconds if waits else 2000 * kernel  # from an idle device; with all of it ahead
    assert [r.device for r in found.device_rounds] == pytest.approx([expected] * CASE.rounds, rel=1e-3)
    assert next(r.host for r in found.rounds) == pytest.approx(2000 * 5e-6 if waits else 1000 * kernel, rel=0.01)


def test_a_long_step_does_not_wait_for_a_host_that_got_slower() -> None:
    device = FakeDevice()
    calls = 0

    def step() -> None:
        nonlocal calls
        calls += 1
        for _ in range(10):
            device.host += 5e-4 if calls > 30 else 0.0  # 5 ms in all, the lead is 1.1
            device.work(2e-3)

    found = measured(device, step, BY_DEVICE)
    assert median(r.host for r in found.ahead) > found.lead
    assert not found.waits_for_host
    assert found.device_rounds[-1].device == pytest.approx(2e-2)


def test_a_step_of_seconds_gets_no_lead() -> None:
    device = FakeDevice()
    device.launch_seconds = 5e-5
    found = measured(device, lambda: device.work(1.0), BY_DEVICE, beside=launches(device, 20, 1e-3))
    assert (found.ahead, found.lead, found.waits_for_host) == ([], 0.0, True)
    assert len(found.device_rounds) == len(found.rounds) == CASE.rounds
    # What is beside it does, so that its time is the one that it has beside any other.
    assert [r.device for r in found.beside_ahead] == pytest.approx([1e-3] * CASE.rounds)


def test_with_a_lead_rounds_are_interleaved_too() -> None:
    device = FakeDevice(noise=0.003, drift=4.0)
    order: list[str] = []

    def step(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            device.work(seconds)

        return run

    found = measured(device, step("B", 1.02e-3), BY_DEVICE, beside=step("A", 1e-3))
    assert "".join(order).endswith("ABBA" * (CASE.rounds // 2))
    ratio = paired_ratio([r.device for r in found.ahead], [r.device for r in found.beside_ahead])
    assert ratio.low < 1.02 < ratio.high
    assert verdict(ratio, noise=0.005, rounds=len(found.ahead)) == "slower"


def test_a_lead_is_used_up_by_one_round() -> None:
    device = FakeDevice()
    clock = Clock(device)
    clock.lead = 1.0
    first, second = (clock.time(lambda: device.work(1e-3)) for _ in range(2))
    assert first.device == pytest.approx(1e-3)
    assert first.wall > 1.5
    assert second.wall == pytest.approx(1e-3, rel=0.01)


def test_leads_fit_the_budget() -> None:
    device = FakeDevice()
    device.launch_seconds = 1e-3
    found = measured(device, lambda: device.work(1e-3), replace(BY_DEVICE, budget=0.1))
    assert (len(found.rounds), len(found.ahead)) == (10, 14)  # 2 ms each; with twice the lead of 2.5 ms 7 ms
