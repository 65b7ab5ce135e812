"""Starting from the last action chunk instead of noise.

Between two calls the policy's plan seldom changes: the trajectory that it sampled last, moved on by the steps that were
executed since, is a good guess of the next one. It is noised to an intermediate timestep and denoised from there, which
takes a few steps where noise takes many.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bacinfer.core.sampler import Sampler
from bacinfer.core.schedule import CacheSchedule

DAMPING = 0.7
"""Of the velocity with which a trajectory goes on beyond its end."""

_VELOCITY_SPAN = 4  # the last steps that the velocity is the mean of


def evenly_spaced(start: int, num_steps: int) -> tuple[int, ...]:
    """`num_steps` timesteps from `start` to 0.

    Raises:
        ValueError: there are not as many.
    """
    if not 1 <= num_steps <= start + 1:
        raise ValueError(f"there are no {num_steps} timesteps from {start} to 0")
    if num_steps == 1:
        return (start,)
    return tuple(round(start * (num_steps - 1 - i) / (num_steps - 1)) for i in range(num_steps))


@dataclass(frozen=True)
class WarmStart:
    """How a call that follows another one is sampled.

    Attributes:
        sampler: Its denoising steps, whose timesteps are given: the first one is the noise level that the last
            trajectory is noised to.
        cache: Which residual blocks are computed at which of these steps; None: all, at every step.
        max_disagreement: A call is sampled from noise all the same, where its trajectory and the one that it started
            from differ by more than this in the part that was planned before: RMS, in normalised units. None: never.
        num_executed: Steps of the trajectory that are executed between two calls; None: the policy's `n_action_steps`.

    Raises:
        ValueError: the sampler's timesteps are not given, the cache is for another number of steps, or a number is out
            of its range.
    """

    sampler: Sampler
    cache: CacheSchedule | None = None
    max_disagreement: float | None = None
    num_executed: int | None = None

    def __post_init__(self) -> None:
        if self.sampler.timesteps is None:
            raise ValueError(f"a warm start needs timesteps, such as ddim:40-20-0, not {self.sampler.spec}")
        if self.cache is not None and self.cache.num_inference_steps != self.sampler.num_steps:
            raise ValueError(
                f"the warm start's cache is for {self.cache.num_inference_steps} denoising steps, its sampler has "
                f"{self.sampler.num_steps}"
            )
        if self.max_disagreement is not None and not self.max_disagreement > 0:
            raise ValueError(f"max_disagreement must be above 0, got {self.max_disagreement}")
        if self.num_executed is not None and self.num_executed < 1:
            raise ValueError(f"num_executed must be at least 1, got {self.num_executed}")

    def to_data(self) -> dict[str, Any]:
        """The warm start as JSON can hold it."""
        return {
            "sampler": self.sampler.to_data(),
            "cache": None if self.cache is None else self.cache.to_data(),
            "max_disagreement": self.max_disagreement,
            "num_executed": self.num_executed,
        }

    @classmethod
    def from_data(cls, data: Any) -> WarmStart:
        """The warm start that `to_data` described; raises ValueError if it is something else."""
        names = {"sampler", "cache", "max_disagreement", "num_executed"}
        if not isinstance(data, dict) or data.keys() != names:
            raise ValueError(f"not a warm start: {str(data)[:200]}")
        cache = None if data["cache"] is None else CacheSchedule.from_data(data["cache"])
        return cls(Sampler.from_data(data["sampler"]), cache, data["max_disagreement"], data["num_executed"])


@dataclass
class Memory:
    """What one stream of calls keeps between them; copies of it are empty.

    Attributes:
        trajectory: The last call's, [B, T, A], normalised; None before the first call of an episode.
    """

    trajectory: Tensor | None = field(default=None)

    def __reduce__(self) -> tuple[Any, ...]:
        return Memory, ()

    def continued(self, like: Tensor, num_executed: int) -> Tensor | None:
        """The last trajectory, moved on; None if there is none of the shape, dtype and device of `like` [B, T, A].

        Raises:
            RuntimeError: all of the trajectory was executed, so that nothing of it is left to start from.
        """
        last = self.trajectory
        if last is None or (last.shape, last.dtype, last.device) != (like.shape, like.dtype, like.device):
            return None
        horizon = last.shape[1]
        if num_executed >= horizon:
            raise RuntimeError(
                f"a warm start continues what was planned beyond the executed steps, but {num_executed} of the "
                f"trajectory's {horizon} steps are executed; use a plan without a warm start"
            )
        span = min(_VELOCITY_SPAN, horizon - 1)
        velocity = (last[:, -1:] - last[:, -1 - span : horizon - span]) / span
        ahead = torch.arange(1, num_executed + 1, dtype=last.dtype, device=last.device).view(1, -1, 1)
        return torch.cat([last[:, num_executed:], last[:, -1:] + DAMPING * velocity * ahead], dim=1)


def disagreement(new: Tensor, continued: Tensor, num_executed: int) -> Tensor:
    """RMS difference [B] of two trajectories [B, T, A] in the part that was planned before, not extrapolated."""
    planned = new.shape[1] - num_executed
    return (new - continued)[:, :planned].square().mean(dim=(1, 2)).sqrt()
