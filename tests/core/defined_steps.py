"""The denoising steps of samplers, from the papers' formulas in double precision."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bacinfer import Sampler

Levels = Callable[[int], Tensor]


class DefinedSteps:
    """DDPM (Ho et al., 2020, eq. 6 and 7), DDIM (Song et al., 2021, eq. 12 and 16) or DPM-Solver++ (Lu et al., 2022,
    algorithm 2, with DDIM's noise), for a model that predicts noise and samples that are clipped to 1.

    Args:
        levels: The share of signal at a timestep.
    """

    def __init__(self, sampler: Sampler, levels: Levels) -> None:
        self.sampler, self.levels = sampler, levels
        self.earlier: tuple[Tensor, Tensor] | None = None  # x0 of the last step, and what log(signal / noise) grew by

    def next_sample(self, x: Tensor, epsilon: Tensor, t: int, following: int) -> Tensor:
        """The sample after the step from one timestep to the next, -1 after the last; draws its noise."""
        x, epsilon = x.double(), epsilon.double()
        alpha, after = self.levels(t), self.levels(following) if following >= 0 else torch.ones(()).double()
        x0 = ((x - (1 - alpha).sqrt() * epsilon) / alpha.sqrt()).clamp(-1, 1)
        ancestral = (1 - after) / (1 - alpha) * (1 - alpha / after)
        if self.sampler.kind == "own":
            of_x0, of_x = after.sqrt() * (1 - alpha / after), (alpha / after).sqrt() * (1 - after)
            mean, variance, is_noisy = (of_x0 * x0 + of_x * x) / (1 - alpha), ancestral, following >= 0
        elif self.sampler.kind == "ddim":
            variance, is_noisy = self.sampler.eta**2 * ancestral, self.sampler.eta > 0
            mean = after.sqrt() * x0 + (1 - after - variance).sqrt() * epsilon
        else:
            variance, is_noisy = self.sampler.eta**2 * ancestral, self.sampler.eta > 0 and following >= 0
            on_line = self.extrapolated(x0, alpha, after)
            noise = (x - alpha.sqrt() * on_line) / (1 - alpha).sqrt()
            mean = after.sqrt() * on_line + (1 - after - variance).sqrt() * noise
        return (mean + variance.sqrt() * torch.randn(x.shape) if is_noisy else mean).float()

    def extrapolated(self, x0: Tensor, alpha: Tensor, after: Tensor) -> Tensor:
        growth = ((after / (1 - after)).log() - (alpha / (1 - alpha)).log()) / 2
        earlier, self.earlier = self.earlier, (x0, growth)
        if earlier is None or after == 1:
            return x0
        ratio = earlier[1] / growth
        return (1 + 1 / (2 * ratio)) * x0 - 1 / (2 * ratio) * earlier[0]
