"""Reading back what the analysis, ours or BACInfer's, left in an assets directory, by block key."""

from __future__ import annotations

import torch
from torch import Tensor

from bacinfer import assets
from bacinfer.analysis.similarity import METRICS, Array, find_metric


def read_residuals(run: assets.RunAssets) -> dict[str, Tensor]:
    """Block key to its recorded residuals [K, ...].

    Raises:
        FileNotFoundError: if nothing was recorded there; lists what is there.
        ValueError: if the file is damaged or holds no residuals of blocks.
    """
    return {block: torch.from_numpy(array) for block, array in assets.read_activations(run).items()}


def read_matrices(run: assets.RunAssets, metric: str) -> dict[str, Array]:
    """Block key to its similarity matrix of one metric.

    Raises:
        FileNotFoundError: if there are none; lists what is there.
        ValueError: if the file is damaged, or holds no matrices of this metric.
    """
    find_metric(metric)
    found = assets.read_matrices(run)
    matrices = {block: by_metric[metric] for block, by_metric in found.items() if metric in by_metric}
    if not matrices:
        there = sorted({name for by_metric in found.values() for name in by_metric} & set(METRICS))
        raise ValueError(f"{run.directory} has no similarity matrices of metric {metric!r}, only of {there}")
    return matrices
