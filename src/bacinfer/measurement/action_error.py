"""How far a policy's actions under a plan are from the plain policy's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bacinfer.core.calls import seeded_noise, timed_call
from bacinfer.core.handle import PolicyHandle
from bacinfer.measurement.statistics import Estimate, estimate_mean


def normalised_actions(policy: Any, observations: Sequence[dict[str, Any]], noise_seed: int = 0) -> Tensor:
    """The action trajectories [len(observations), horizon, action_dim] in the policy's own units, [-1, 1].

    All observations go through one call, whose noise depends on `noise_seed` and their number alone.
    """
    return sampled_actions(policy, as_batch(observations), noise_seed)


def as_batch(observations: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Observations, each of batch size 1, as one batch: tensors [B, ...], and lists of texts."""
    first = observations[0]
    columns = {key: [obs[key] for obs in observations] for key in first}
    return {
        key: torch.cat(column) if isinstance(first[key], Tensor) else [text for texts in column for text in texts]
        for key, column in columns.items()
    }


def sampled_actions(policy: Any, observation: Any, noise_seed: int) -> Tensor:
    """The actions [B, ...] of one call, normalised to [-1, 1] where the policy can, otherwise as it returns them.

    Raises:
        TypeError: the policy returns no actions as a tensor.
    """
    with seeded_noise(policy, noise_seed):
        result, _ = timed_call(policy, observation)
    with torch.no_grad():
        return actions_of(policy, result)


def actions_of(policy: Any, result: Any) -> Tensor:
    """The actions [B, ...] in what a policy returned, normalised to [-1, 1] where the policy can; with their gradients.

    Raises:
        TypeError: there are none, as a tensor.
    """
    actions = result.get("action_pred", result.get("action")) if isinstance(result, Mapping) else result
    if not isinstance(actions, Tensor):
        found = f"a dict of {', '.join(map(str, result))}" if isinstance(result, Mapping) else type(result).__name__
        raise TypeError(f"expected actions as a tensor, or a dict with 'action_pred' or 'action', got {found}")
    return policy.normalizer["action"].normalize(actions) if is_normalised(policy) else actions


def is_normalised(policy: Any) -> bool:
    """Whether a policy has a normaliser of its actions that is Diffusion Policy's, or built like it."""
    if isinstance(policy, PolicyHandle):
        return False
    try:
        return callable(policy.normalizer["action"].normalize)
    except (AttributeError, TypeError, LookupError):
        return False


def rms_difference(plain: Tensor, cached: Tensor) -> Estimate:
    """Root mean square of the difference of two batches [N, ...], with its interval over the N observations.

    Raises:
        ValueError: batches of different shapes.
    """
    if plain.shape != cached.shape:
        raise ValueError(f"action trajectories of shapes {tuple(plain.shape)} and {tuple(cached.shape)}")
    squares = (cached - plain).double().square().flatten(start_dim=1).mean(dim=1)
    return estimate_mean(squares.tolist()).root()
