"""Medians, ratios and verdicts of the bench."""

import numpy as np
import pytest

from conformance.bench.bootstrap import Interval, median_interval, paired_ratio, ratio_of_medians, verdict


def samples(median: float, seed: int, rounds: int = 30) -> list[float]:
    """Times with 1 % of noise, as a quiet GPU gives them."""
    return list(median * np.exp(np.random.default_rng(seed).normal(0, 0.01, rounds)))


def test_the_interval_holds_the_median_and_is_the_same_each_time() -> None:
    found = median_interval(samples(3.0, seed=0))
    assert found.low < found.median < found.high
    assert found == median_interval(samples(3.0, seed=0))
    with pytest.raises(ValueError, match="no samples"):
        median_interval([])


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    hits = 0
    for seed in range(100):
        found = median_interval(samples(1.0, seed))
        hits += found.low <= 1.0 <= found.high
    assert 88 <= hits <= 99  # 95 of 100, with a standard deviation of 2


def test_an_outlier_does_not_move_the_median() -> None:
    quiet = samples(1.0, seed=0)
    assert median_interval([*quiet[1:], 50.0]).median == pytest.approx(median_interval(quiet).median, rel=0.01)


@pytest.mark.parametrize("seed", range(10))
def test_a_slowdown_of_two_percent_is_found(seed: int) -> None:
    ratio = ratio_of_medians(samples(1.02, seed), samples(1.0, seed + 100))
    assert verdict(ratio, noise=0.005, rounds=30) == "slower"
    ratio = ratio_of_medians(samples(1.0, seed), samples(1.02, seed + 100))
    assert verdict(ratio, noise=0.005, rounds=30) == "faster"


@pytest.mark.parametrize("seed", range(10))
def test_equals_are_ambiguous(seed: int) -> None:
    ratio = ratio_of_medians(samples(1.0, seed), samples(1.0, seed + 100))
    assert verdict(ratio, noise=0.005, rounds=30) == "ambiguous"


def test_what_is_within_the_noise_floor_is_ambiguous() -> None:
    assert verdict(Interval(1.02, 1.01, 1.03), noise=0.02, rounds=30) == "ambiguous"
    assert verdict(Interval(1.02, 1.01, 1.03), noise=0.005, rounds=30) == "slower"


def test_few_rounds_allow_no_verdict() -> None:
    ratio = ratio_of_medians([2.0, 2.0], [1.0, 1.0])
    assert ratio == Interval(2.0, 2.0, 2.0)
    assert verdict(ratio, noise=0.0, rounds=2) == "ambiguous"


def test_a_paired_ratio_is_free_of_what_both_have() -> None:
    drift = np.linspace(1.0, 2.0, 30)
    ratio = paired_ratio(list(1.02 * drift), list(drift))
    assert [ratio.low, ratio.high] == pytest.approx([1.02, 1.02])
    with pytest.raises(ValueError, match="longer"):
        paired_ratio([1.0], [1.0, 2.0])
