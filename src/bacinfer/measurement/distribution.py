"""How far a plan's actions are from the plain policy's as distributions, not draw by draw."""

from __future__ import annotations

import torch
from torch import Tensor


def energy_distance(found: Tensor, plain: Tensor) -> float:
    """The energy distance (Székely and Rizzo, 2013) of two samples, averaged over observations.

    Zero where both have one distribution, up to chance: the expectation is unbiased, so it may come out below 0.

    Args:
        found, plain: [N, S, ...], S >= 2 draws at each of N observations.
    """
    x, y = (samples.double().flatten(start_dim=2) for samples in (found, plain))
    across = torch.cdist(x, y).mean()
    within = sum(torch.cdist(z, z).sum(dim=(1, 2)).mean() / (z.shape[1] * (z.shape[1] - 1)) for z in (x, y))
    return float(2 * across - within)


def sliced_wasserstein(found: Tensor, plain: Tensor, num_directions: int = 64, seed: int = 0) -> float:
    """The mean 1-Wasserstein distance of two samples in random directions, averaged over observations.

    Args:
        found, plain: [N, S, ...], as many draws of both.
        num_directions, seed: Of the directions (Bonneel et al., 2015).
    """
    x, y = (samples.double().flatten(start_dim=2) for samples in (found, plain))
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(x.shape[-1], num_directions, dtype=x.dtype, generator=generator)
    directions = (directions / directions.norm(dim=0)).to(x.device)
    projected = [(samples @ directions).sort(dim=1).values for samples in (x, y)]
    return float((projected[0] - projected[1]).abs().mean())
