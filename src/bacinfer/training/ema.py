"""Exponential moving average of a policy's weights, with Diffusion Policy's warm-up of the decay."""

from __future__ import annotations

import torch
from torch import nn


class EMAModel:
    """Moves ``averaged`` towards a model at every step.

    The decay after ``n`` steps is ``1 - (1 + n / inv_gamma) ** -power``, within [``min_value``, ``max_value``], and 0
    up to and including step ``update_after_step + 1``: the average starts as a copy.
    """

    def __init__(
        self,
        averaged: nn.Module,
        update_after_step: int = 0,
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
        min_value: float = 0.0,
        max_value: float = 0.9999,
    ) -> None:
        self.averaged = averaged.eval().requires_grad_(False)
        self.update_after_step = update_after_step
        self.inv_gamma = inv_gamma
        self.power = power
        self.min_value = min_value
        self.max_value = max_value

    def decay(self, step: int) -> float:
        """The decay at optimisation step ``step``, counted from 0."""
        warm = step - self.update_after_step - 1
        if warm <= 0:
            return 0.0
        return max(self.min_value, min(1 - (1 + warm / self.inv_gamma) ** -self.power, self.max_value))

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights of ``model`` after optimisation step ``step``; frozen parameters are copied."""
        averaged = dict(self.averaged.named_parameters())
        averages: list[torch.Tensor] = []
        parameters: list[torch.Tensor] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                averages.append(averaged[name])
                parameters.append(parameter)
            else:
                averaged[name].copy_(parameter)
        decay = self.decay(step)
        torch._foreach_mul_(averages, decay)
        torch._foreach_add_(averages, parameters, alpha=1 - decay)
