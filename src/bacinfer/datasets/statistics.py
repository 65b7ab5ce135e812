"""The statistics that a LeRobot data set keeps of every feature, for an episode and for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
STATISTICS = ("min", "max", "mean", "std", "count", *QUANTILES)
PIXEL_LEVELS = np.arange(256) / 255


def number_statistics(values: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """`STATISTICS` of [frames, n] over the frames, each [n]; count is [1].

    Quantiles are values that occur. lerobot reads them off a histogram of 5,000 bins: equal up to a bin's width.
    """
    numbers = values.astype(np.float64)
    quantiles = np.quantile(numbers, list(QUANTILES.values()), axis=0, method="inverted_cdf")
    return {
        "min": values.min(axis=0),
        "max": values.max(axis=0),
        "mean": numbers.mean(axis=0),
        "std": numbers.std(axis=0),
        "count": np.array([len(values)]),
        **dict(zip(QUANTILES, quantiles, strict=True)),
    }


def image_statistics(histogram: NDArray[np.int64], num_frames: int) -> dict[str, NDArray[Any]]:
    """`STATISTICS` of pixel values in [0, 1] from their counts [3, 256], each [3, 1, 1]; count is [1], the frames.

    Over all pixels of all frames, where lerobot takes samples of long episodes and large images.
    """
    share = histogram / histogram.sum(axis=1, keepdims=True)
    mean = share @ PIXEL_LEVELS
    cumulative = histogram.cumsum(axis=1)
    total = cumulative[:, -1:]
    statistics = {
        "min": PIXEL_LEVELS[(cumulative == 0).sum(axis=1)],
        "max": PIXEL_LEVELS[(cumulative < total).sum(axis=1)],
        "mean": mean,
        "std": np.sqrt((share * (PIXEL_LEVELS - mean[:, None]) ** 2).sum(axis=1)),
        **{name: PIXEL_LEVELS[(cumulative < q * total).sum(axis=1)] for name, q in QUANTILES.items()},
    }
    return {name: value.reshape(3, 1, 1) for name, value in statistics.items()} | {"count": np.array([num_frames])}


def merge_statistics(episodes: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The statistics of all episodes from those of each, which are stacked in the first dimension.

    As lerobot merges them: exact, but for the quantiles, which are the episodes' means weighted by their frames.
    """
    count = episodes["count"].sum(axis=0)
    weights = episodes["count"].reshape(-1, *[1] * (episodes["mean"].ndim - 1)) / count
    mean = (weights * episodes["mean"]).sum(axis=0)
    variance = (weights * (episodes["std"] ** 2 + (episodes["mean"] - mean) ** 2)).sum(axis=0)
    return {
        "min": episodes["min"].min(axis=0),
        "max": episodes["max"].max(axis=0),
        "mean": mean,
        "std": np.sqrt(variance),
        "count": count,
        **{name: (weights * episodes[name]).sum(axis=0) for name in QUANTILES},
    }
