"""Medians with an interval, ratios with an interval, and a verdict that may be "ambiguous"."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Verdict = Literal["faster", "slower", "ambiguous"]

RESAMPLES = 4000
FEWEST_ROUNDS = 5  # the bootstrap of fewer says nothing: the interval of two samples is the samples


@dataclass(frozen=True)
class Interval:
    """A median and its 95 % interval."""

    median: float
    low: float
    high: float

    def scaled(self, factor: float) -> "Interval":
        """In another unit."""
        return Interval(self.median * factor, self.low * factor, self.high * factor)


def medians(samples: Sequence[float], generator: np.random.Generator) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """Medians of samples drawn with replacement, (RESAMPLES,)."""
    values = np.asarray(samples, dtype=np.float64)
    return np.median(values[generator.integers(len(values), size=(RESAMPLES, len(values)))], axis=1)


def around(middle: float, resampled: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> Interval:
    """The percentile interval."""
    low, high = np.percentile(resampled, (2.5, 97.5))
    return Interval(middle, float(low), float(high))


def median_interval(samples: Sequence[float]) -> Interval:
    """Median with its bootstrap interval (Efron 1979, percentile method). The same samples give the same interval.

    Raises:
        ValueError: without samples.
    """
    if not len(samples):
        raise ValueError("there are no samples to take a median of.")
    return around(float(np.median(samples)), medians(samples, np.random.default_rng(0)))


def paired_ratio(new: Sequence[float], old: Sequence[float]) -> Interval:
    """Median of ``new[i] / old[i]``, of rounds that were interleaved: what drifts in both cancels.

    Raises:
        ValueError: if they are not pairs.
    """
    return median_interval([a / b for a, b in zip(new, old, strict=True)])


def ratio_of_medians(new: Sequence[float], old: Sequence[float]) -> Interval:
    """``median(new) / median(old)``, of two runs."""
    generator = np.random.default_rng(0)
    middle = float(np.median(new) / np.median(old))
    return around(middle, medians(new, generator) / medians(old, generator))


def verdict(ratio: Interval, noise: float, rounds: int) -> Verdict:
    """What a ratio of times, new over old, allows to be said.

    Args:
        ratio: with its interval.
        noise: how far from 1 a ratio was when nothing differed. An effect that is smaller is none.
        rounds: of the side with fewer.
    """
    if rounds < FEWEST_ROUNDS:
        return "ambiguous"
    if ratio.high < 1 - noise:
        return "faster"
    if ratio.low > 1 + noise:
        return "slower"
    return "ambiguous"
