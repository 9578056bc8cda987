"""The learning rate: warm-up, peak, cosine, and the edges where they meet."""

import math
from itertools import pairwise
from typing import Any

import pytest

from reference.config import TrainConfig
from reference.training.schedule import learning_rate


def rates(updates: int, warmup: int = 0, minimum: float | None = None, peak: float = 1.0, **more: Any) -> list[float]:
    config = TrainConfig(updates=updates, warmup=warmup, min_lr=minimum, **more)
    return [learning_rate(config, n, peak) for n in range(updates)]


def test_constant() -> None:
    assert rates(5, peak=0.3, schedule="constant", minimum=0.1) == [0.3] * 5


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_minimum_is_a_tenth_of_the_peak_unless_given(schedule: str) -> None:
    assert rates(50, peak=3.0, schedule=schedule)[-1] == pytest.approx(0.3, rel=1e-12)


def test_wsd_is_flat_and_then_decays_by_a_root_in_the_last_updates() -> None:
    seen = rates(20, warmup=4, minimum=0.1, schedule="wsd", cooldown=9)
    assert seen[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert seen[4:11] == [1.0] * 7
    assert seen[11:] == [pytest.approx(1 - 0.9 * math.sqrt(n / 9), rel=1e-12) for n in range(1, 10)]
    assert seen[-1] == 0.1


def test_wsd_cools_down_for_a_fifth_of_the_updates_unless_told() -> None:
    assert rates(10, schedule="wsd").count(1.0) == 8


def test_wsd_that_only_cools_down() -> None:
    assert rates(4, warmup=2, minimum=0.0, schedule="wsd", cooldown=2)[-2:] == [pytest.approx(1 - 0.5**0.5), 0.0]


def test_warmup_starts_above_zero_rises_in_equal_steps_and_reaches_the_peak() -> None:
    assert rates(7, warmup=4, peak=5.0, schedule="constant") == [1.0, 2.0, 3.0, 4.0, 5.0, 5.0, 5.0]


def test_cosine_starts_at_the_peak_and_ends_exactly_at_the_minimum() -> None:
    seen = rates(11, minimum=0.1)
    assert seen[0] == 1.0
    assert seen[5] == pytest.approx(0.55, rel=1e-12)  # half way
    assert seen[10] == 0.1
    assert seen == [pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * n / 10)), rel=1e-12) for n in range(11)]
    assert all(later < earlier for earlier, later in pairwise(seen))


def test_warmup_then_cosine() -> None:
    seen = rates(10, warmup=3, minimum=0.2, peak=2.0)
    assert seen[:4] == [0.5, 1.0, 1.5, 2.0]
    assert seen.count(2.0) == 1
    assert seen[6] == pytest.approx(1.1, rel=1e-12)  # half way from update 3 to update 9
    assert seen[-1] == 0.2


def test_minimum_of_zero_is_a_minimum() -> None:
    assert rates(4, minimum=0.0)[-1] == 0.0


@pytest.mark.parametrize("minimum", [0.0, 0.1])
def test_warmup_as_long_as_the_run_never_reaches_the_peak(minimum: float) -> None:
    assert rates(4, warmup=4, minimum=minimum, peak=5.0) == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(("minimum", "expected"), [(0.0, 0.0), (0.1, 0.1)])
def test_warmup_until_the_last_update(minimum: float, expected: float) -> None:
    assert rates(4, warmup=3, minimum=minimum, peak=5.0) == [1.25, 2.5, 3.75, expected]


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize(("warmup", "minimum", "expected"), [(0, 0.0, 0.0), (0, 0.1, 0.1), (1, 0.1, 0.5)])
def test_a_single_update(schedule: str, warmup: int, minimum: float, expected: float) -> None:
    assert rates(1, warmup=warmup, minimum=minimum, schedule=schedule) == [expected]


def test_after_the_end_the_rate_stays_at_the_minimum() -> None:
    assert learning_rate(TrainConfig(updates=10, min_lr=0.1), 50, 1.0) == 0.1
