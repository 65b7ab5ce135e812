"""Means with their uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

CONFIDENCE = 0.95
_EQUAL = 1e-6  # values that differ by less differ by rounding


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error and 95 % confidence interval.

    One value alone has neither; they are None then.
    """

    mean: float
    standard_error: float | None
    low: float | None
    high: float | None
    count: int

    def root(self) -> Estimate:
        """The square root of a mean that is not negative: its interval end to end, its error to first order."""
        root = sqrt(self.mean)
        if self.standard_error is None or self.low is None or self.high is None:
            return Estimate(root, None, None, None, self.count)
        error = self.standard_error / (2 * root) if root else 0.0
        return Estimate(root, error, sqrt(max(self.low, 0)), sqrt(self.high), self.count)

    @property
    def signed(self) -> str:
        """A difference with its interval, ``+0.006 [-0.012, +0.024]``."""
        if self.low is None:
            return f"{self.mean:+.3f}"
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"

    def __str__(self) -> str:
        if self.standard_error is None:
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} ± {self.standard_error:.3f}"


def estimate_mean(values: Sequence[float], bounds: tuple[float, float] | None = None) -> Estimate:
    """The mean of independent values, such as the scores of episodes, with Student's interval.

    Values that are all equal have no spread to tell an interval from, which is not to say that all others are equal to
    them too. With `bounds` their interval is the rule of three's: of n equal values, others make up at most
    1 − 0.05^(1/n) of all, about 3/n (with 95 % confidence), and are bounds at worst.

    Args:
        bounds: the least and the largest possible value.

    Raises:
        ValueError: no values.
    """
    from scipy import stats

    count = len(values)
    if count == 0:
        raise ValueError("the mean of no values")
    mean = float(np.mean(values))
    if count == 1:
        return Estimate(mean, None, None, None, count)
    standard_error = float(np.std(values, ddof=1) / np.sqrt(count))
    if bounds is not None and np.ptp(values) < _EQUAL:
        others = 1 - (1 - CONFIDENCE) ** (1 / count)
        low, high = min(bounds[0], mean), max(bounds[1], mean)
        return Estimate(mean, standard_error, mean - others * (mean - low), mean + others * (high - mean), count)
    half_width = float(stats.t.ppf(0.5 + CONFIDENCE / 2, df=count - 1)) * standard_error
    return Estimate(mean, standard_error, mean - half_width, mean + half_width, count)


def estimate_score(scores: Sequence[float]) -> Estimate:
    """The mean score of episodes, each in 0..1; see `estimate_mean`."""
    return estimate_mean(scores, bounds=(0, 1))


def estimate_paired_difference(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """The mean of ``after − before``, scores in 0..1, pair by pair: what both of a pair (one seed) share drops out.

    If all pairs are equal, the interval is not [0, 0] but what n of them leave open, ±3/n; see `estimate_mean`.

    Raises:
        ValueError: sequences of different lengths, or empty ones.
    """
    return estimate_mean([b - a for a, b in zip(before, after, strict=True)], bounds=(-1, 1))


def estimate_proportion(proportion: float, count: int) -> Estimate:
    """The share of `count` episodes in which something happened, with Wilson's interval.

    Raises:
        ValueError: no share of that many episodes.
    """
    from scipy import stats

    successes = round(proportion * count)
    if count < 1 or not 0 <= successes <= count:
        raise ValueError(f"{proportion} is no share of {count} episodes")
    interval = stats.binomtest(successes, count).proportion_ci(CONFIDENCE, method="wilson")
    standard_error = sqrt(proportion * (1 - proportion) / count)
    return Estimate(proportion, standard_error, float(interval.low), float(interval.high), count)
