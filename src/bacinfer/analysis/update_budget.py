"""Costs of holding residuals -> update steps: one budget of computation, spent where it saves most error.

For each block a dynamic programme gives the least cost for every number of updates M. One price of computation, the
Lagrange multiplier, then decides for all blocks how many updates are worth it: so blocks get different M, and no other
schedule of the same computation has a smaller sum of costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bacinfer.analysis.similarity import Array
from bacinfer.analysis.update_steps import UpdateSteps, best_partitions

_NUM_HALVINGS = 100
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Curve:
    """What updates of a block are worth.

    Attributes:
        errors: [K]; entry M-1 is the least cost with M updates.
        steps: Entry M-1 is the M update steps that have it.
    """

    errors: Array
    steps: tuple[UpdateSteps, ...]

    @classmethod
    def of(cls, costs: Array) -> Curve:
        """The curve of costs [K, K+1]: entry [a, e] that of an update at step a which is reused until step e-1."""
        K = len(costs)
        steps = best_partitions(-costs, range(1, K + 1))
        errors = [sum(costs[a, e] for a, e in zip(of_M, (*of_M[1:], K), strict=True)) for of_M in steps.values()]
        return cls(np.array(errors), tuple(steps.values()))

    def num_updates(self, price: float) -> int:
        """The M of least error with its computation, if an update costs `price`; the smallest of equals."""
        return int(np.argmin(self.errors + price * np.arange(1, len(self.errors) + 1))) + 1


def check_budget(budget: float, num_steps: int) -> None:
    """Raises ValueError unless a budget is a number from 1, where all blocks are computed once, to K = `num_steps`."""
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 1 <= budget <= num_steps:
        raise ValueError(
            f"budget must be a number in 1..{num_steps} (evaluations of all blocks: the first step computes them, and "
            f"there are K = {num_steps} steps), got {budget!r}"
        )


def spend(curves: Mapping[str, Curve], weights: Mapping[str, float], budget: float) -> dict[str, UpdateSteps]:
    """The update steps of all blocks whose computation stays within a budget.

    Args:
        curves: Block key to what its updates are worth.
        weights: Block key to its share of the blocks' computation; they sum to 1.
        budget: In evaluations of all blocks, 1 or more.
    """

    def bought(price: float) -> dict[str, int]:
        return {block: curve.num_updates(price * weights[block]) for block, curve in curves.items()}

    def cost(num_updates: Mapping[str, int]) -> float:
        return sum(weights[block] * M for block, M in num_updates.items())

    # At `high` no second update of any block is worth its price; at `low` too much is bought, or all that helps.
    low, high = 0.0, 2 * max(curve.errors[0] / weights[block] for block, curve in curves.items())
    best = bought(low)
    if cost(best) > budget * (1 + _ROUNDING):
        for _ in range(_NUM_HALVINGS):
            middle = (low + high) / 2
            if cost(bought(middle)) > budget * (1 + _ROUNDING):
                low = middle
            else:
                high = middle
        best = bought(high)
    return {block: curve.steps[best[block] - 1] for block, curve in curves.items()}
