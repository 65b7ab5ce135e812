"""The dynamic programme against brute force over all subsets of steps."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bacinfer.analysis.similarity import METRICS, similarity
from bacinfer.analysis.update_steps import objective, optimal_update_steps


def brute_force(matrix: np.ndarray, budget: int, maximise: bool) -> tuple[int, ...]:
    """The lexicographically smallest of the best choices: `combinations` come in lexicographic order."""
    choices = [(0, *rest) for rest in itertools.combinations(range(1, len(matrix)), budget - 1)]
    scores = [objective(matrix, choice) for choice in choices]
    return choices[scores.index(max(scores) if maximise else min(scores))]


def matrices(elements: st.SearchStrategy[float]) -> st.SearchStrategy[np.ndarray]:
    return st.integers(1, 8).flatmap(
        lambda k: st.lists(elements, min_size=k * k, max_size=k * k).map(lambda v: np.reshape(v, (k, k)))
    )


@settings(max_examples=150, deadline=None)
@given(matrix=matrices(st.integers(-2, 2)), maximise=st.booleans())
def test_equals_brute_force_ties_included(matrix: np.ndarray, maximise: bool) -> None:
    budgets = range(1, len(matrix) + 1)
    found = optimal_update_steps(matrix, budgets, maximise=maximise)
    assert found == {budget: brute_force(matrix, budget, maximise) for budget in budgets}


@settings(max_examples=100, deadline=None)
@given(matrix=matrices(st.floats(-10, 10)), maximise=st.booleans())
def test_real_valued_matrices_reach_the_best_objective(matrix: np.ndarray, maximise: bool) -> None:
    for budget, steps in optimal_update_steps(matrix, range(1, len(matrix) + 1), maximise=maximise).items():
        assert steps[0] == 0
        assert len(steps) == budget
        best = objective(matrix, brute_force(matrix, budget, maximise))
        assert objective(matrix, steps) == pytest.approx(best, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("num_steps", [1, 2, 5, 8])
def test_every_metric_reaches_the_best_objective(metric: str, num_steps: int) -> None:
    generator = torch.Generator().manual_seed(num_steps)
    residuals = torch.randn(num_steps, 1, 4, 6, generator=generator).cumsum(dim=0)
    matrix, maximise = similarity(residuals, [metric])[metric], METRICS[metric].maximise
    for budget, steps in optimal_update_steps(matrix, range(1, num_steps + 1), maximise=maximise).items():
        best = objective(matrix, brute_force(matrix, budget, maximise))
        assert objective(matrix, steps) == pytest.approx(best, rel=1e-12, abs=1e-12)


def test_segments_of_equal_residuals_are_found() -> None:
    """Residuals 0 0 0 5 5 9 9 9: three updates, at the three changes, cost nothing."""
    values = torch.tensor([0.0, 0, 0, 5, 5, 9, 9, 9])[:, None]
    matrix = similarity(values, ["l1"])["l1"]
    steps = optimal_update_steps(matrix, [3], maximise=False)[3]
    assert steps == (0, 3, 5)
    assert objective(matrix, steps) == 0


def test_objective_by_hand() -> None:
    matrix = np.arange(16.0).reshape(4, 4)
    assert objective(matrix, [0, 2]) == 0 + 1 + 10 + 11


def test_ties_take_the_earliest_steps() -> None:
    assert optimal_update_steps(np.zeros((6, 6)), [1, 3, 6], maximise=False) == {
        1: (0,),
        3: (0, 1, 2),
        6: (0, 1, 2, 3, 4, 5),
    }


def test_a_budget_does_not_depend_on_which_others_are_asked_for() -> None:
    matrix = np.random.default_rng(0).normal(size=(30, 30))
    together = optimal_update_steps(matrix, range(1, 31), maximise=True)
    assert all(optimal_update_steps(matrix, [m], maximise=True) == {m: together[m]} for m in (1, 2, 17, 30))


def test_no_budget_gives_no_schedule() -> None:
    assert optimal_update_steps(np.zeros((3, 3)), [], maximise=True) == {}


@pytest.mark.parametrize("budget", [0, -1, 5, 2.5, True, "3"])
def test_budgets_outside_1_to_k_are_refused(budget: object) -> None:
    with pytest.raises(ValueError, match=r"integer in 1\.\.4"):
        optimal_update_steps(np.zeros((4, 4)), [2, budget], maximise=True)  # type: ignore[list-item]


@pytest.mark.parametrize("shape", [(3, 4), (0, 0), (3,), (2, 2, 2)])
def test_matrices_that_are_not_square_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="square"):
        optimal_update_steps(np.zeros(shape), [1], maximise=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_matrices_that_are_not_finite_are_refused(bad: float) -> None:
    matrix = np.zeros((3, 3))
    matrix[1, 2] = bad
    with pytest.raises(ValueError, match=r"not finite.*\[1, 2\]"):
        optimal_update_steps(matrix, [1], maximise=True)
