"""How alike a block's residuals are at every two denoising steps.

For a block, entry [i, j] of a K×K matrix compares the flattened residuals of step i and step j. The scheduler
reads row c as "what it is worth (or costs) to reuse step c's residual at step t" (BAC, arXiv 2506.13456).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

EPSILON = 1e-8

Array = NDArray[np.floating]


class StepVectors:
    """The flattened residuals of one block, a float64 row [F] per denoising step, and what metrics share of them."""

    def __init__(self, residuals: Tensor) -> None:
        self.rows = residuals.reshape(len(residuals), -1).double()  # [K, F]
        self.num_features = self.rows.shape[1]

    @cached_property
    def squared_distances(self) -> Tensor:
        """|r_i − r_j|² for every two steps, [K, K], from one Gram matrix.

        Subtracting the mean row first changes no distance, but keeps what all steps share out of the squares,
        where it would cancel digits.
        """
        centred = self.rows - self.rows.mean(dim=0)
        gram = centred @ centred.T
        squares = gram.diagonal()
        return (squares[:, None] + squares[None, :] - (gram + gram.T)).clamp_(min=0).fill_diagonal_(0)


def cosine(steps: StepVectors) -> Tensor:
    """r_i · r_j / (|r_i| |r_j|); 0 where one of the two residuals is zero, 1 on the diagonal."""
    directions = normalize(steps.rows, dim=1, eps=EPSILON)
    similarity = directions @ directions.T
    return ((similarity + similarity.T) / 2).clamp_(-1, 1).fill_diagonal_(1)


def mse(steps: StepVectors) -> Tensor:
    """Mean squared difference."""
    return steps.squared_distances / steps.num_features


def l1(steps: StepVectors) -> Tensor:
    """Sum of absolute differences."""
    return pairwise_l1(steps.rows)


def l2(steps: StepVectors) -> Tensor:
    """Euclidean norm of the difference."""
    return steps.squared_distances.sqrt()


def wasserstein(steps: StepVectors) -> Tensor:
    """Sum of |CDF differences| of the residuals' absolute values, each normalised to sum 1 (+1e-8) over positions."""
    weights = steps.rows.abs()
    distributions = weights / (weights.sum(dim=1, keepdim=True) + EPSILON)
    return pairwise_l1(distributions.cumsum(dim=1))


def pairwise_l1(rows: Tensor) -> Tensor:
    """The sum of absolute differences of every two rows of [K, F], as a symmetric [K, K]."""
    above_diagonal = torch.triu_indices(len(rows), len(rows), offset=1)
    distances = rows.new_zeros(len(rows), len(rows))
    distances[above_diagonal[0], above_diagonal[1]] = torch.pdist(rows, p=1)
    return distances + distances.T


@dataclass(frozen=True)
class Metric:
    """A comparison of residuals, and whether the scheduler maximises it (a similarity) or minimises it (a distance)."""

    compare: Callable[[StepVectors], Tensor]
    maximise: bool = False


# A new metric is one function above and one line here.
METRICS: dict[str, Metric] = {
    "cosine": Metric(cosine, maximise=True),
    "mse": Metric(mse),
    "l1": Metric(l1),
    "l2": Metric(l2),
    "wasserstein": Metric(wasserstein),
}


def find_metric(name: str) -> Metric:
    """The metric registered as `name`.

    Raises:
        ValueError: if there is none; the message lists those there are.
    """
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}; known are {', '.join(METRICS)}")
    return METRICS[name]


def similarity(residuals: Tensor, metrics: Sequence[str], block: str = "block") -> dict[str, Array]:
    """Compares a block's residuals at every two denoising steps.

    Args:
        residuals: [K, ...], the block's residual at each denoising step.
        metrics: Names in `METRICS`.
        block: The block's name, for error messages.

    Returns:
        For each metric a symmetric matrix [K, K], float64. Distances are exactly 0 on the diagonal.

    Raises:
        ValueError: if a metric is unknown, there are no values, or a residual is not finite.
    """
    compare = {name: find_metric(name).compare for name in metrics}
    check_residuals(residuals, block)
    steps = StepVectors(residuals)
    return {name: function(steps).cpu().numpy() for name, function in compare.items()}


def check_residuals(residuals: Tensor, block: str) -> None:
    """Checks that a block's residuals [K, ...] can be compared.

    Raises:
        ValueError: if there are none, or some are not finite; the message names the block and the first step.
    """
    if residuals.ndim < 2 or residuals.numel() == 0:
        raise ValueError(f"{block}: expected residuals [K, ...] of at least one step, got {tuple(residuals.shape)}")
    num_finite = num_finite_steps(residuals)
    if num_finite < len(residuals):
        raise ValueError(
            f"{block}: the residual of denoising step {num_finite} holds NaN or infinity; "
            f"check the checkpoint and the observation"
        )


def num_finite_steps(residuals: Tensor) -> int:
    """How many steps there are before the first residual [K, ...] that is not finite; K if all are finite."""
    finite = residuals.reshape(len(residuals), -1).isfinite().all(dim=1)
    return int(finite.long().cumprod(dim=0).sum())
