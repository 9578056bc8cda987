"""How rounds are interleaved, and the lead of the host that the device time is taken with."""

import gc
import math
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import pytest

from conformance.bench.bootstrap import paired_ratio, verdict
from conformance.bench.case import Case, Prepared
from conformance.bench.clock import Clock
from conformance.bench.measure import doubts_about, measure
from tests.bench.fake_device import BY_DEVICE, CASE, FakeDevice, measured, pedantic_with


@pytest.mark.parametrize(("case", "drift"), [(CASE, 8.0), (BY_DEVICE, 3.5)], ids=["by the wall", "by the device"])
def test_rounds_are_interleaved_so_that_drift_cancels(case: Case, drift: float) -> None:
    # The card gets 50 % slower in the course of the rounds, which take longer with leads between them; the step takes
    # 2 % longer than the one beside it.
    device = FakeDevice(noise=0.005, drift=drift)
    order: list[str] = []

    def step(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            device.work(seconds)

        return run

    found = measured(device, step("B", 1.02e-3), case, beside=step("A", 1e-3))
    assert "".join(order).endswith("ABBA" * (case.rounds // 2))
    beside = found.beside_ahead or found.beside
    ratio = paired_ratio([r.device for r in found.device_rounds], [r.device for r in beside])
    assert ratio.low < 1.02 < ratio.high
    assert ratio.high - ratio.low < 0.02
    assert verdict(ratio, noise=0.005, rounds=len(beside)) == "slower"


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
    assert abs(ratio.median - 1) < 0.005  # of the 3 % that a side would gain


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
