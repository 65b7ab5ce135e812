"""One call of a denoising loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingCall:
    """The trajectory's given part [B, T, A] and where it is given, the condition (tokens [B, n_obs_steps, cond_dim], or
    a vector [B, cond_dim]) or None, a generator, and what goes on to the scheduler.

    Attributes:
        start: The trajectory [B, T, A] at the first timestep; None: noise, which the loop draws.
    """

    given: Tensor
    is_given: Tensor
    condition: Tensor | None
    generator: torch.Generator | None
    step_arguments: dict[str, Any]
    start: Tensor | None = None

    def draw_noise(self) -> Tensor:
        """Standard normal noise [B, T, A], by the call of the loop."""
        given = self.given
        return torch.randn(given.shape, dtype=given.dtype, device=given.device, generator=self.generator)
