"""Means with their uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error and 95 % confidence interval (Student's t).

    One value alone has neither; they are None then.
    """

    mean: float
    standard_error: float | None
    low: float | None
    high: float | None
    count: int

    def __str__(self) -> str:
        if self.standard_error is None:
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} ± {self.standard_error:.3f}"


def estimate_mean(values: Sequence[float]) -> Estimate:
    """The mean of independent values, such as the scores of episodes.

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
    half_width = float(stats.t.ppf(0.5 + CONFIDENCE / 2, df=count - 1)) * standard_error
    return Estimate(mean, standard_error, mean - half_width, mean + half_width, count)


def estimate_paired_difference(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """The mean of ``after − before``, value by value: what is common to a pair (the same seed) drops out.

    Raises:
        ValueError: sequences of different lengths, or empty ones.
    """
    return estimate_mean([b - a for a, b in zip(before, after, strict=True)])
