"""The learning rate: warm-up, peak, cosine, and the edges where they meet."""

import math
from itertools import pairwise

import pytest

from reference.schedule import learning_rate


def rates(updates: int, warmup: int = 0, minimum: float | None = None, peak: float = 1.0) -> list[float]:
    return [learning_rate(n, peak=peak, updates=updates, warmup=warmup, minimum=minimum) for n in range(updates)]


def test_constant_without_minimum() -> None:
    assert rates(5, peak=0.3) == [0.3] * 5


def test_warmup_starts_above_zero_rises_in_equal_steps_and_reaches_the_peak() -> None:
    assert rates(7, warmup=4, peak=5.0) == [1.0, 2.0, 3.0, 4.0, 5.0, 5.0, 5.0]


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


@pytest.mark.parametrize("minimum", [None, 0.1])
def test_warmup_as_long_as_the_run_never_reaches_the_peak(minimum: float | None) -> None:
    assert rates(4, warmup=4, minimum=minimum, peak=5.0) == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(("minimum", "expected"), [(None, 5.0), (0.1, 0.1)])
def test_warmup_until_the_last_update(minimum: float | None, expected: float) -> None:
    assert rates(4, warmup=3, minimum=minimum, peak=5.0) == [1.25, 2.5, 3.75, expected]


@pytest.mark.parametrize(
    ("warmup", "minimum", "expected"), [(0, None, 1.0), (0, 0.1, 0.1), (1, None, 0.5), (1, 0.1, 0.5)]
)
def test_a_single_update(warmup: int, minimum: float | None, expected: float) -> None:
    assert rates(1, warmup=warmup, minimum=minimum) == [expected]


def test_after_the_end_the_rate_stays_at_the_minimum() -> None:
    assert learning_rate(50, peak=1.0, updates=10, minimum=0.1) == 0.1
