"""What Diffusion Policy's transformer policies have in common: sampling, and the training loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bacinfer.core.engines.fused.recognition import program_stands_for
from bacinfer.policies.reference.module import PlacedModule
from bacinfer.policies.reference.normalizer import LinearNormalizer
from bacinfer.policies.reference.transformer import TransformerForDiffusion


class ObservedPart(PlacedModule):
    """Which entries of a trajectory [B, T, action_dim + obs_dim] are observed: the first steps' observation."""

    def __init__(self, action_dim: int, n_obs_steps: int) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.n_obs_steps = n_obs_steps

    def forward(self, shape: torch.Size) -> torch.Tensor:
        mask = torch.zeros(shape, dtype=torch.bool, device=self.device)
        if shape[-1] > self.action_dim:
            mask[:, : self.n_obs_steps, self.action_dim :] = True
        return mask


class DiffusionTransformerPolicy(PlacedModule):
    """Denoises an action trajectory, given the latest observations, each a vector of `obs_dim` normalised numbers.

    The observation is either a condition of the model (``obs_as_cond``) or the fixed part of a joint trajectory of
    actions and observations, of which the rest is painted in.

    Args:
        model: predicts noise, called as ``model(trajectory, timestep, cond)``.
        noise_scheduler: a diffusers scheduler.
        horizon, n_obs_steps, n_action_steps: steps predicted, observed, executed.
        num_inference_steps: denoising steps K; ``None`` means the scheduler's training steps.
        pred_action_steps_only: the trajectory is the executed steps only.
        **kwargs: passed on to every ``noise_scheduler.step``.
    """

    def __init__(
        self,
        model: TransformerForDiffusion,
        noise_scheduler: Any,
        horizon: int,
        obs_dim: int,
        action_dim: int,
        n_action_steps: int,
        n_obs_steps: int,
        num_inference_steps: int | None = None,
        obs_as_cond: bool = False,
        pred_action_steps_only: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if pred_action_steps_only and not obs_as_cond:
            raise ValueError("pred_action_steps_only=True needs obs_as_cond=True")
        self.model = model
        self.noise_scheduler = noise_scheduler
        self.mask_generator = ObservedPart(action_dim, n_obs_steps)
        self.normalizer = LinearNormalizer()
        self.horizon = horizon
        self.obs_dim = obs_dim
        self.action_dim = action_dim
        self.n_action_steps = n_action_steps
        self.n_obs_steps = n_obs_steps
        self.obs_as_cond = obs_as_cond
        self.pred_action_steps_only = pred_action_steps_only
        self.num_inference_steps = num_inference_steps or noise_scheduler.config.num_train_timesteps
        self.kwargs = kwargs

    @property
    def _executed(self) -> slice:
        """The part of the horizon that is executed: from the latest observation on."""
        start = self.n_obs_steps - 1
        return slice(start, start + self.n_action_steps)

    def reset(self) -> None:
        """Nothing to forget between episodes."""

    def set_normalizer(self, normalizer: nn.Module) -> None:
        self.normalizer.load_state_dict(normalizer.state_dict())

    @program_stands_for
    def conditional_sample(
        self,
        condition_data: torch.Tensor,
        condition_mask: torch.Tensor,
        cond: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Denoise a trajectory [B, T, D] from pure noise, keeping ``condition_data`` where ``condition_mask``."""
        trajectory = torch.randn(
            condition_data.shape,
            dtype=condition_data.dtype,
            device=condition_data.device,
            generator=generator,
        )
        self.noise_scheduler.set_timesteps(self.num_inference_steps)
        for t in self.noise_scheduler.timesteps:
            trajectory = torch.where(condition_mask, condition_data, trajectory)
            noise = self.model(trajectory, t, cond)
            trajectory = self.noise_scheduler.step(noise, t, trajectory, generator=generator, **kwargs).prev_sample
        return torch.where(condition_mask, condition_data, trajectory)

    def _sample(self, observed: torch.Tensor) -> torch.Tensor:
        """A normalised trajectory [B, T, action_dim (+ obs_dim)] for what was observed [B, n_obs_steps, obs_dim]."""
        length = self.n_action_steps if self.pred_action_steps_only else self.horizon
        width = self.action_dim if self.obs_as_cond else self.action_dim + self.obs_dim
        condition = torch.zeros(len(observed), length, width, device=self.device, dtype=self.dtype)
        if not self.obs_as_cond:
            condition[:, : self.n_obs_steps, self.action_dim :] = observed
        return self.conditional_sample(
            condition,
            self.mask_generator(condition.shape),
            cond=observed if self.obs_as_cond else None,
            **self.kwargs,
        )

    def _actions(self, sample: torch.Tensor) -> dict[str, torch.Tensor]:
        """A trajectory's ``action`` [B, n_action_steps, action_dim] and ``action_pred`` [B, T, action_dim], in data
        units."""
        action_pred = self.normalizer["action"].unnormalize(sample[..., : self.action_dim])
        return {
            "action": action_pred if self.pred_action_steps_only else action_pred[:, self._executed],
            "action_pred": action_pred,
        }

    def _denoising_loss(self, observed: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Mean squared error of the noise predicted at random timesteps (Ho et al., 2020, algorithm 1).

        Args:
            observed: normalised, [B, n_obs_steps, obs_dim] if it is the condition, [B, horizon, obs_dim] if not.
            action: [n B, horizon, action_dim], in data units; n rows in a row belong to each observation.
        """
        observed = observed.repeat_interleave(len(action) // len(observed), dim=0)
        trajectory = self.normalizer["action"].normalize(action)
        if not self.obs_as_cond:
            trajectory = torch.cat([trajectory, observed], dim=-1)
        elif self.pred_action_steps_only:
            trajectory = trajectory[:, self._executed]
        given = self.mask_generator(trajectory.shape)

        noise = torch.randn(trajectory.shape, device=trajectory.device)
        timesteps = torch.randint(
            0, self.noise_scheduler.config.num_train_timesteps, (len(trajectory),), device=trajectory.device
        )
        noisy = self.noise_scheduler.add_noise(trajectory, noise, timesteps)
        cond = observed if self.obs_as_cond else None
        prediction = self.model(torch.where(given, trajectory, noisy), timesteps, cond)

        kind = self.noise_scheduler.config.prediction_type
        targets = {"epsilon": noise, "sample": trajectory}
        if kind not in targets:
            raise ValueError(f"prediction_type {kind!r} cannot be trained; known: {', '.join(targets)}")
        return (F.mse_loss(prediction, targets[kind], reduction="none") * ~given).mean()
