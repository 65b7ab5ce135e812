"""Distances of samples."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import energy_distance as energy_distance_1d
from scipy.stats import wasserstein_distance

from bacinfer.measurement.distribution import energy_distance, sliced_wasserstein


def draws(seed: int, mean: float = 0.0, spread: float = 1.0, count: int = 400) -> torch.Tensor:
    return mean + spread * torch.randn(3, count, 4, 2, generator=torch.Generator().manual_seed(seed))


def test_one_distribution_is_no_distance_from_itself() -> None:
    assert abs(energy_distance(draws(0), draws(1))) < 0.02
    assert sliced_wasserstein(draws(0), draws(1)) < 0.1


@pytest.mark.parametrize("distance", [energy_distance, sliced_wasserstein])
def test_other_means_and_spreads_are_seen(distance) -> None:  # type: ignore[no-untyped-def]
    small, large = (distance(draws(0), draws(1, mean=mean)) for mean in (0.2, 0.5))
    assert 0.02 < small < large
    assert distance(draws(0), draws(1, spread=0.5)) > 0.1


def test_in_one_dimension_they_are_those_of_scipy() -> None:
    x, y = (torch.randn(1, 500, 1, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    y = 0.4 + 1.5 * y
    expected = energy_distance_1d(x.flatten(), y.flatten()) ** 2
    assert energy_distance(x, y) == pytest.approx(expected, abs=0.01)  # scipy's is the biased estimate
    assert sliced_wasserstein(x, y) == pytest.approx(wasserstein_distance(x.flatten(), y.flatten()), rel=1e-5)
