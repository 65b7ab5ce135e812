"""Similarity matrix -> update steps: the adaptive caching scheduler (ACS; BAC, arXiv 2506.13456).

A block that updates at steps c_0 = 0 < c_1 < … < c_{M-1} reuses the residual of c_m at the steps c_m … c_{m+1}-1.
The scheduler finds the M steps for which the sum of S[c_m, t] over all those reuses is best.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from bacinfer.analysis.similarity import Array
from bacinfer.core.schedule import check_num_updates

UpdateSteps = tuple[int, ...]


def optimal_update_steps(similarity: Array, budgets: Iterable[int], *, maximise: bool) -> dict[int, UpdateSteps]:
    """The best update steps of one block for each budget, from a single dynamic programme.

    Args:
        similarity: [K, K]; entry [c, t] says how good (or bad) it is to reuse step c's residual at step t.
        budgets: Numbers of update steps M, each in 1..K.
        maximise: Whether entries are similarities (True) or distances (False).

    Returns:
        For each budget M its M update steps (step indices, ascending, the first 0). Among equally good ones the
        lexicographically smallest.

    Raises:
        ValueError: if the matrix is not square, empty or not finite, or a budget is not an integer in 1..K.
    """
    similarity = _checked(similarity)
    num_steps = len(similarity)
    budgets = list(budgets)
    for budget in budgets:
        check_num_updates(budget, num_steps)
    return best_partitions(_segment_sums(similarity if maximise else -similarity), budgets)


def best_partitions(segments: Array, budgets: Sequence[int]) -> dict[int, UpdateSteps]:
    """For each budget M the M update steps whose segments have the largest sum.

    Args:
        segments: [K, K+1]; entry [a, e] is the worth of an update at step a that is reused until step e-1; -inf where
            e <= a.
        budgets: Numbers of update steps M, each in 1..K.
    """
    if not budgets:
        return {}
    num_steps = len(segments)
    # best[a]: the best sum over steps a..K-1 when a is an update and `remaining` updates (a included) are left.
    # Only where it is not -inf does a plan exist. following[remaining][a]: the next update after a in that plan;
    # argmax takes the smallest of equals, which makes the whole plan the lexicographically smallest.
    best = segments[:, num_steps]
    following: dict[int, NDArray[np.intp]] = {}
    for remaining in range(2, max(budgets) + 1):
        candidates = segments[:, :num_steps] + best  # [a, b]: a's segment ends where b's begins
        following[remaining] = candidates.argmax(axis=1)
        best = candidates.max(axis=1)
    return {budget: _follow(following, budget) for budget in budgets}


def objective(similarity: Array, steps: Sequence[int]) -> float:
    """What the scheduler optimises: the sum of S[c, t] over all steps t, c being the last update step up to t."""
    similarity = np.asarray(similarity, dtype=np.float64)
    ends = [*steps[1:], len(similarity)]
    return float(sum(similarity[start, start:end].sum() for start, end in zip(steps, ends, strict=True)))


def _segment_sums(similarity: Array) -> Array:
    """[a, e], K × (K+1): the sum of S[a, t] over t = a..e-1, and -inf where e <= a."""
    num_steps = len(similarity)
    sums = np.full((num_steps, num_steps + 1), -np.inf)
    above = np.triu_indices(num_steps)
    sums[:, 1:][above] = np.triu(similarity).cumsum(axis=1)[above]
    return sums


def _follow(following: dict[int, NDArray[np.intp]], budget: int) -> UpdateSteps:
    steps = [0]
    for remaining in range(budget, 1, -1):
        steps.append(int(following[remaining][steps[-1]]))
    return tuple(steps)


def _checked(similarity: Array) -> Array:
    similarity = np.asarray(similarity, dtype=np.float64)
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1] or not similarity.size:
        raise ValueError(f"expected a square similarity matrix [K, K], got shape {similarity.shape}")
    if not np.isfinite(similarity).all():
        row, column = np.argwhere(~np.isfinite(similarity))[0]
        raise ValueError(f"the similarity matrix is not finite: {similarity[row, column]} at [{row}, {column}]")
    return similarity
