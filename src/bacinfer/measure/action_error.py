"""How far a cached policy's actions are from the plain policy's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bacinfer.measure.statistics import Estimate, estimate_mean
from bacinfer.tasks.base import seeded_noise, timed_call


def normalised_actions(policy: Any, observations: Sequence[dict[str, Tensor]], noise_seed: int = 0) -> Tensor:
    """The action trajectories [len(observations), horizon, action_dim] in the policy's own units, [-1, 1].

    All observations go through one call, whose noise depends on `noise_seed` and their number alone.
    """
    batch = {key: torch.cat([obs[key] for obs in observations]) for key in observations[0]}
    with seeded_noise(policy, noise_seed):
        result, _ = timed_call(policy, batch)
    with torch.no_grad():
        return policy.normalizer["action"].normalize(result["action_pred"])


def rms_difference(plain: Tensor, cached: Tensor) -> Estimate:
    """Root mean square of the difference of two batches [N, ...], with its interval over the N observations.

    Raises:
        ValueError: batches of different shapes.
    """
    if plain.shape != cached.shape:
        raise ValueError(f"action trajectories of shapes {tuple(plain.shape)} and {tuple(cached.shape)}")
    squares = (cached - plain).double().square().flatten(start_dim=1).mean(dim=1)
    return estimate_mean(squares.tolist()).root()
