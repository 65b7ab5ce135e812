"""Diffusion Policy's transformer policy for images and low-dimensional observations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bacinfer.policies.reference.policy import DiffusionTransformerPolicy
from bacinfer.policies.reference.transformer import TransformerForDiffusion
from bacinfer.policies.reference.vision import ObservationEncoder


class DiffusionTransformerHybridImagePolicy(DiffusionTransformerPolicy):
    """Plans from what cameras see, and from vectors, all encoded into one vector a step.

    Args:
        shape_meta: ``obs``: shape and type of each observation (see `ObservationEncoder`); ``action``: its shape.
        crop_shape, obs_encoder_group_norm, eval_fixed_crop: see `ObservationEncoder`.
        n_layer, …, causal_attn, time_as_cond: see `TransformerForDiffusion`.
        noise_scheduler, …, **kwargs: see `DiffusionTransformerPolicy`.
    """

    def __init__(
        self,
        shape_meta: Mapping[str, Any],
        noise_scheduler: Any,
        horizon: int,
        n_action_steps: int,
        n_obs_steps: int,
        num_inference_steps: int | None = None,
        crop_shape: Sequence[int] | None = (76, 76),
        obs_encoder_group_norm: bool = False,
        eval_fixed_crop: bool = False,
        n_layer: int = 8,
        n_cond_layers: int = 0,
        n_head: int = 4,
        n_emb: int = 256,
        p_drop_emb: float = 0.0,
        p_drop_attn: float = 0.3,
        causal_attn: bool = True,
        time_as_cond: bool = True,
        obs_as_cond: bool = True,
        pred_action_steps_only: bool = False,
        **kwargs: Any,
    ) -> None:
        encoder = ObservationEncoder(shape_meta["obs"], crop_shape, eval_fixed_crop, obs_encoder_group_norm)
        (action_dim,) = shape_meta["action"]["shape"]
        width = action_dim if obs_as_cond else action_dim + encoder.output_dim
        model = TransformerForDiffusion(
            input_dim=width,
            output_dim=width,
            horizon=horizon,
            n_obs_steps=n_obs_steps,
            cond_dim=encoder.output_dim if obs_as_cond else 0,
            n_layer=n_layer,
            n_head=n_head,
            n_emb=n_emb,
            p_drop_emb=p_drop_emb,
            p_drop_attn=p_drop_attn,
            causal_attn=causal_attn,
            time_as_cond=time_as_cond,
            obs_as_cond=obs_as_cond,
            n_cond_layers=n_cond_layers,
        )
        super().__init__(
            model=model,
            noise_scheduler=noise_scheduler,
            horizon=horizon,
            obs_dim=encoder.output_dim,
            action_dim=action_dim,
            n_action_steps=n_action_steps,
            n_obs_steps=n_obs_steps,
            num_inference_steps=num_inference_steps,
            obs_as_cond=obs_as_cond,
            pred_action_steps_only=pred_action_steps_only,
            **kwargs,
        )
        self.obs_encoder = encoder

    def predict_action(self, obs_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Plan from the latest observations.

        Args:
            obs_dict: of each key of ``shape_meta``, [B, n_obs_steps or more, *shape]; the first ``n_obs_steps`` are
                used. Images are [C, H, W], from 0 to 1.

        Returns:
            ``action`` [B, n_action_steps, action_dim] and ``action_pred`` [B, horizon, action_dim].

        Raises:
            ValueError: an observation is missing, not known or of another shape, or an image is made of integers.
        """
        self._check(obs_dict)
        return self._actions(self._sample(self._encode(obs_dict, self.n_obs_steps)))

    def compute_loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """The loss of denoising the actions.

        Args:
            batch: ``obs``, of each key [B, horizon, *shape], and ``action`` [B, horizon, action_dim], in data units. Of
                the observations the first ``n_obs_steps`` suffice where they are the condition. There may be n times as
                many rows of actions, n in a row for each observation: encoding that is what takes the time.
        """
        if self.obs_as_cond:
            observed = self._encode(batch["obs"], self.n_obs_steps)
        else:  # a part of what is to be painted, which the encoder could otherwise make easy
            observed = self._encode(batch["obs"], self.horizon).detach()
        return self._denoising_loss(observed, batch["action"])

    def get_optimizer(
        self,
        transformer_weight_decay: float,
        obs_encoder_weight_decay: float,
        learning_rate: float,
        betas: tuple[float, float],
    ) -> torch.optim.Optimizer:
        """AdamW with a weight decay for the transformer's matrices and another one for all of the encoder."""
        groups = self.model.get_optim_groups(transformer_weight_decay)
        groups.append({"params": list(self.obs_encoder.parameters()), "weight_decay": obs_encoder_weight_decay})
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(betas[0], betas[1]))

    def _encode(self, obs: Mapping[str, torch.Tensor], num_steps: int) -> torch.Tensor:
        """The first steps' observations as vectors, [B, num_steps, obs_dim]."""
        steps = {key: value[:, :num_steps].flatten(0, 1) for key, value in obs.items()}
        return self.obs_encoder(self.normalizer.normalize(steps)).unflatten(0, (-1, num_steps))

    def _check(self, obs_dict: Mapping[str, torch.Tensor]) -> None:
        shapes = self.obs_encoder.shapes
        if set(obs_dict) != set(shapes):
            raise ValueError(f"obs_dict must hold {sorted(shapes)}, found {sorted(obs_dict)}")
        for key, shape in shapes.items():
            value = obs_dict[key]
            if value.ndim < 2 or value.shape[1] < self.n_obs_steps or value.shape[2:] != shape:
                expected = ", ".join(map(str, ("B", self.n_obs_steps, *shape)))
                raise ValueError(f"observation {key!r} of shape {tuple(value.shape)}, expected [{expected}]")
            if key in self.obs_encoder.obs_nets and not value.is_floating_point():
                raise ValueError(f"observation {key!r} is an image of {value.dtype}, expected floats from 0 to 1")
