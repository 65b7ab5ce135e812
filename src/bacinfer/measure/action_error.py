"""How far a policy's actions under a plan are from the plain policy's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bacinfer.core.calls import seeded_noise, timed_call
from bacinfer.core.handle import PolicyHandle
from bacinfer.measure.statistics import Estimate, estimate_mean


def sampled_actions(policy: Any, observations: Sequence[Mapping[str, Tensor]], noise_seed: int = 0) -> Tensor:
    """The actions [N, ...] at observations, normalised to [-1, 1] where the policy can, otherwise as it returns them.

    All observations go through one call, whose noise depends on `noise_seed` and their number alone.

    Raises:
        TypeError: the observations are no dicts of tensors, or the policy returns no actions as a tensor.
    """
    with seeded_noise(policy, noise_seed):
        result, _ = timed_call(policy, _joined(observations))
    actions = result
    if isinstance(result, Mapping):
        actions = result.get("action_pred", result.get("action", result))
    if not isinstance(actions, Tensor):
        found = f"a dict of {', '.join(map(str, result))}" if isinstance(result, Mapping) else type(result).__name__
        raise TypeError(f"expected actions as a tensor, or a dict with 'action_pred' or 'action', got {found}")
    with torch.no_grad():
        return policy.normalizer["action"].normalize(actions) if is_normalised(policy) else actions


def is_normalised(policy: Any) -> bool:
    """Whether a policy has a normaliser of its actions that is Diffusion Policy's, or built like it."""
    if isinstance(policy, PolicyHandle):
        return False
    try:
        return callable(policy.normalizer["action"].normalize)
    except (AttributeError, TypeError, LookupError):
        return False


def _joined(observations: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    for observation in observations:
        wrong = observation.values() if isinstance(observation, Mapping) else [observation]
        for value in wrong:
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"expected observations as dicts of tensors, found {type(value).__name__}; let a method that a "
                    f"bacinfer.PolicyHandle names add whatever else the policy needs"
                )
    return {key: torch.cat([observation[key] for observation in observations]) for key in observations[0]}


def rms_difference(plain: Tensor, cached: Tensor) -> Estimate:
    """Root mean square of the difference of two batches [N, ...], with its interval over the N observations.

    Raises:
        ValueError: batches of different shapes.
    """
    if plain.shape != cached.shape:
        raise ValueError(f"action trajectories of shapes {tuple(plain.shape)} and {tuple(cached.shape)}")
    squares = (cached - plain).double().square().flatten(start_dim=1).mean(dim=1)
    return estimate_mean(squares.tolist()).root()
