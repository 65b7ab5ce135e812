"""The denoising loop of Diffusion Policy's transformer policies, `conditional_sample`, and one call of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bacinfer.core.patching import Patch


@dataclass(frozen=True)
class SamplingCall:
    """The arguments of `conditional_sample`: the trajectory's given part [B, T, A] and where it is given, the
    condition [B, n_obs_steps, cond_dim] or None, a generator, and what goes on to the scheduler.

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


class DenoisingLoop(Patch):
    """Replaces `conditional_sample`. Subclasses say by `sample` with what."""

    def __init__(self, policy: Any) -> None:
        super().__init__(policy, "conditional_sample")

    def sample(self, call: SamplingCall) -> Tensor:
        """The denoised trajectory [B, T, A] of a call."""
        raise NotImplementedError

    def call_original(self, call: SamplingCall) -> Tensor:
        return self.original(
            call.given, call.is_given, cond=call.condition, generator=call.generator, **call.step_arguments
        )

    def run(
        self,
        condition_data: Tensor,
        condition_mask: Tensor,
        cond: Tensor | None = None,
        generator: torch.Generator | None = None,
        **step_arguments: Any,
    ) -> Tensor:
        return self.sample(SamplingCall(condition_data, condition_mask, cond, generator, step_arguments))
