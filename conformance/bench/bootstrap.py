"""Medians with an interval, ratios with an interval, and a verdict that may be "ambiguous"."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from conformance.bench.plain import Positive

Verdict = Literal["faster", "slower", "ambiguous"]

RESAMPLES = 4000
FEWEST_ROUNDS = 5  # the bootstrap of fewer says nothing: the interval of two samples is the samples


@dataclass(frozen=True)
class Interval:
    """A median and its 95 % interval."""

    median: Positive
    low: Positive
    high: Positive


def resample(samples: Sequence[float], generator: np.random.Generator) -> NDArray[np.float64]:
    """Return RESAMPLES medians of as many samples, drawn with replacement."""
    values = np.asarray(samples, dtype=np.float64)
    return np.median(values[generator.integers(len(values), size=(RESAMPLES, len(values)))], axis=1)


def around(middle: float, resampled: NDArray[np.float64]) -> Interval:
    """Return the percentile interval of resampled medians around the median itself."""
    low, high = np.percentile(resampled, (2.5, 97.5))
    return Interval(middle, float(low), float(high))


def median_interval(samples: Sequence[float]) -> Interval:
    """Return the median with its bootstrap interval (Efron 1979, percentile method); the same for the same samples.

    Raises:
        ValueError: without samples.
    """
    if not len(samples):
        raise ValueError("there are no samples to take a median of.")
    return around(float(np.median(samples)), resample(samples, np.random.default_rng(0)))


def paired_ratio(new: Sequence[float], old: Sequence[float]) -> Interval:
    """Return the median of ``new[i] / old[i]`` over interleaved rounds: what drifts in both cancels.

    Raises:
        ValueError: if they are not pairs.
    """
    return median_interval([a / b for a, b in zip(new, old, strict=True)])


def ratio_of_medians(new: Sequence[float], old: Sequence[float]) -> Interval:
    """Return ``median(new) / median(old)`` of two runs."""
    generator = np.random.default_rng(0)
    middle = float(np.median(new) / np.median(old))
    return around(middle, resample(new, generator) / resample(old, generator))


def verdict(ratio: Interval, noise: float, rounds: int) -> Verdict:
    """Say what a ratio of times, new over old, shows.

    Args:
        ratio: with its interval.
        noise: how far from 1 a ratio was when nothing differed. A smaller effect counts as none.
        rounds: the rounds of the side that has fewer.
    """
    if rounds >= FEWEST_ROUNDS and ratio.high < 1 - noise:
        return "faster"
    if rounds >= FEWEST_ROUNDS and ratio.low > 1 + noise:
        return "slower"
    return "ambiguous"
