"""Similarity matrices against the definitions, written out entry by entry."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bacinfer.analysis.similarity import METRICS, find_metric, similarity
from bacinfer.core.bubbling import block_error

NUM_STEPS = 7
DISTANCES = [name for name, metric in METRICS.items() if not metric.maximise]


def by_definition(metric: str, a: np.ndarray, b: np.ndarray) -> float:
    """One entry of a similarity matrix, from two residuals flattened to float64 vectors."""
    if metric == "cosine":
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
    if metric == "mse":
        return float(np.mean((a - b) ** 2))
    if metric == "l1":
        return float(np.sum(np.abs(a - b)))
    if metric == "l2":
        return float(np.sqrt(np.sum((a - b) ** 2)))
    assert metric == "wasserstein"
    p, q = (np.abs(v) / (np.abs(v).sum() + 1e-8) for v in (a, b))
    return float(np.sum(np.abs(np.cumsum(p) - np.cumsum(q))))


def random_residuals(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(NUM_STEPS, 2, 4, 8, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("metric", METRICS)
def test_each_entry_is_the_metric_of_its_two_steps(metric: str, dtype: torch.dtype) -> None:
    residuals = random_residuals(0, dtype)
    rows = residuals.flatten(1).double().numpy()
    expected = np.array([[by_definition(metric, a, b) for b in rows] for a in rows])
    np.testing.assert_allclose(similarity(residuals, [metric])[metric], expected, rtol=1e-12, atol=1e-7)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), offset=st.floats(-1e3, 1e3), scale=st.floats(1e-3, 1e3))
def test_matrices_are_symmetric_finite_and_exact_on_the_diagonal(seed: int, offset: float, scale: float) -> None:
    for metric, matrix in similarity(offset + scale * random_residuals(seed), list(METRICS)).items():
        assert matrix.shape == (NUM_STEPS, NUM_STEPS)
        assert matrix.dtype == np.float64
        assert np.isfinite(matrix).all()
        assert (matrix == matrix.T).all()
        if metric in DISTANCES:
            assert (matrix >= 0).all()
            assert (matrix.diagonal() == 0).all()
        else:
            assert (np.abs(matrix) <= 1).all()
            assert (matrix.diagonal() == 1).all()


@pytest.mark.parametrize("metric", ["mse", "l2"])
def test_small_differences_beside_a_large_common_part_keep_their_digits(metric: str) -> None:
    residuals = 1e4 + 1e-3 * random_residuals(1, torch.float64)
    rows = residuals.flatten(1).numpy()
    expected = np.array([[by_definition(metric, a, b) for b in rows] for a in rows])
    np.testing.assert_allclose(similarity(residuals, [metric])[metric], expected, rtol=1e-6, atol=0)


def test_equal_residuals_are_at_distance_zero() -> None:
    residuals = torch.ones(3, 1, 2, 2)
    matrices = similarity(residuals, list(METRICS))
    assert all((matrices[metric] == 0).all() for metric in DISTANCES)
    np.testing.assert_allclose(matrices["cosine"], 1, atol=1e-15)


def test_a_residual_of_zero_gives_no_nan() -> None:
    residuals = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)])
    matrices = similarity(residuals, list(METRICS))
    np.testing.assert_array_equal(matrices["cosine"], np.eye(2))
    assert all(np.isfinite(matrix).all() for matrix in matrices.values())


def test_the_l1_matrix_also_holds_the_block_error() -> None:
    residuals = random_residuals(2)
    pairs = similarity(residuals, ["l1"])["l1"][np.triu_indices(NUM_STEPS, k=1)]
    num_features = residuals[0].numel()
    assert block_error(residuals) == pytest.approx(pairs.mean() / num_features, rel=1e-12)


def test_an_unknown_metric_is_named_beside_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'manhattan'.*cosine, mse, l1, l2, wasserstein"):
        similarity(random_residuals(0), ["manhattan"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_residuals_that_are_not_finite_name_block_and_step(bad: float) -> None:
    residuals = random_residuals(0)
    residuals[4, 0, 1, 2] = bad
    with pytest.raises(ValueError, match=r"decoder.layers.3.dropout1.*step 4"):
        similarity(residuals, ["cosine"], block="decoder.layers.3.dropout1")


@pytest.mark.parametrize("shape", [(0, 2, 3), (5, 0), (5,)])
def test_residuals_without_values_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected residuals \[K, \.\.\.\]"):
        similarity(torch.zeros(shape), ["cosine"])


def test_only_cosine_is_maximised() -> None:
    assert {name for name in METRICS if find_metric(name).maximise} == {"cosine"}
