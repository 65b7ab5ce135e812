"""Diffusion Policy's transformer policy for low-dimensional observations."""

from __future__ import annotations

import torch

from bacinfer.policies.reference.policy import DiffusionTransformerPolicy


class DiffusionTransformerLowdimPolicy(DiffusionTransformerPolicy):
    """Plans from observations that are vectors."""

    def predict_action(self, obs_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Plan from the latest observations.

        Args:
            obs_dict: ``{"obs": [B, n_obs_steps or more, obs_dim]}``; the first ``n_obs_steps`` are used.

        Returns:
            ``action`` [B, n_action_steps, action_dim] and ``action_pred`` [B, horizon, action_dim]; when the
            observation is painted in, also ``action_obs_pred`` and ``obs_pred``.

        Raises:
            ValueError: the observation is missing or has another width.
        """
        if set(obs_dict) != {"obs"}:
            raise ValueError(f"obs_dict must hold 'obs' alone, found {sorted(obs_dict)}")
        obs = obs_dict["obs"]
        if obs.ndim != 3 or obs.shape[1] < self.n_obs_steps or obs.shape[2] != self.obs_dim:
            raise ValueError(
                f"observation of shape {tuple(obs.shape)}, expected [B, {self.n_obs_steps}, {self.obs_dim}]"
            )
        sample = self._sample(self.normalizer["obs"].normalize(obs)[:, : self.n_obs_steps])
        result = self._actions(sample)
        if not self.obs_as_cond:
            obs_pred = self.normalizer["obs"].unnormalize(sample[..., self.action_dim :])
            result |= {"action_obs_pred": obs_pred[:, self._executed], "obs_pred": obs_pred}
        return result

    def compute_loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of denoising the actions.

        Args:
            batch: ``obs`` [B, horizon, obs_dim] and ``action`` [B, horizon, action_dim], in data units.
        """
        obs = self.normalizer["obs"].normalize(batch["obs"])
        return self._denoising_loss(obs[:, : self.n_obs_steps] if self.obs_as_cond else obs, batch["action"])

    def get_optimizer(
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float]
    ) -> torch.optim.Optimizer:
        """AdamW with weight decay on the model's matrices only."""
        return self.model.configure_optimizers(learning_rate, weight_decay, (betas[0], betas[1]))
