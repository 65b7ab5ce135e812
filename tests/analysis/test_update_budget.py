"""The dynamic programme and the multiplier against all schedules there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bacinfer.analysis.update_budget import Curve, spend
from bacinfer.analysis.update_steps import UpdateSteps

K = 5


def random_costs(seed: int, num_steps: int = K) -> np.ndarray:
    costs = np.random.default_rng(seed).exponential(size=(num_steps, num_steps + 1))
    costs[np.arange(num_steps), np.arange(1, num_steps + 1)] = 0  # an update that is not reused
    costs[np.tril_indices(num_steps)] = np.inf
    return costs


def error(costs: np.ndarray, steps: UpdateSteps) -> float:
    return sum(costs[a, e] for a, e in itertools.pairwise((*steps, len(costs))))


def all_steps(num_steps: int = K) -> list[UpdateSteps]:
    rest = range(1, num_steps)
    return [(0, *chosen) for n in range(num_steps) for chosen in itertools.combinations(rest, n)]


@pytest.mark.parametrize("seed", range(5))
def test_a_curve_has_the_least_error_for_every_number_of_updates(seed: int) -> None:
    costs = random_costs(seed, 7)
    curve = Curve.of(costs)
    for M, (least, steps) in enumerate(zip(curve.errors, curve.steps, strict=True), start=1):
        assert len(steps) == M
        assert least == pytest.approx(error(costs, steps))
        assert least == pytest.approx(min(error(costs, other) for other in all_steps(7) if len(other) == M))
    assert curve.errors[-1] == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(1, K), st.sampled_from([(0.5, 0.5), (0.25, 0.75), (0.2, 0.3, 0.5)]))
def test_nothing_of_the_same_computation_has_less_error(seed: int, budget: float, shares: tuple[float, ...]) -> None:
    costs = {str(i): random_costs(seed + i) for i in range(len(shares))}
    weights = dict(zip(costs, shares, strict=True))
    found = spend({block: Curve.of(c) for block, c in costs.items()}, weights, budget)
    spent = sum(weights[block] * len(steps) for block, steps in found.items())
    assert spent <= budget + 1e-6
    curves = [[(share * M, least) for M, least in enumerate(Curve.of(c).errors, 1)] for c, share in
              zip(costs.values(), shares, strict=True)]  # fmt: skip
    others = [
        (sum(cost for cost, _ in chosen), sum(least for _, least in chosen)) for chosen in itertools.product(*curves)
    ]
    total = sum(error(costs[block], steps) for block, steps in found.items())
    assert total == pytest.approx(min(least for cost, least in others if cost <= spent + 1e-9))


def test_the_whole_budget_buys_everything_and_the_least_one_update_each() -> None:
    curves = {str(i): Curve.of(random_costs(i)) for i in range(3)}
    weights = {"0": 0.2, "1": 0.3, "2": 0.5}
    assert all(steps == tuple(range(K)) for steps in spend(curves, weights, K).values())
    assert all(steps == (0,) for steps in spend(curves, weights, 1).values())


def test_more_budget_is_no_worse_and_reaches_what_matters_first() -> None:
    costs = {"matters": 100 * random_costs(0), "hardly": random_costs(1)}
    curves = {block: Curve.of(c) for block, c in costs.items()}
    found = [spend(curves, {"matters": 0.5, "hardly": 0.5}, budget) for budget in np.linspace(1, K, 9)]
    errors = [sum(error(costs[block], steps) for block, steps in steps_of.items()) for steps_of in found]
    assert errors == sorted(errors, reverse=True)
    assert all(len(steps_of["matters"]) >= len(steps_of["hardly"]) for steps_of in found)
