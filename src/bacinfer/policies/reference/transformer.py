"""The denoising transformer of Diffusion Policy (Chi et al., 2023), under the parameter names of its checkpoints."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from bacinfer.core.engines.fused.recognition import program_stands_for
from bacinfer.policies.reference.module import PlacedModule


class SinusoidalEmbedding(nn.Module):
    """Timesteps [B] to features [B, dim]: sines, then cosines, of geometrically spaced frequencies."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    @program_stands_for
    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        half = self.dim // 2
        decay = math.log(10000) / (half - 1)
        frequencies = torch.exp(torch.arange(half, device=timesteps.device) * -decay)
        angles = timesteps[:, None] * frequencies[None, :]
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


class TransformerForDiffusion(PlacedModule):
    """Predicts the noise in a trajectory from the denoising timestep and, where given, the observations.

    With ``time_as_cond`` (the default) it is a decoder: trajectory tokens attend to each other and, by
    cross-attention, to the condition tokens (timestep first, then the observations). Without, it is an encoder over the
    timestep token and the trajectory tokens.

    Args:
        input_dim, output_dim: width of a trajectory step, before and after.
        horizon: steps in the trajectory.
        n_obs_steps: observation steps in the condition; ``None`` means ``horizon``.
        cond_dim: width of an observation; 0 means that observations are no condition tokens.
        obs_as_cond: accepted because checkpoints name it; ``cond_dim > 0`` decides, as it does where they were made.
        n_cond_layers: layers of the condition encoder; 0 means a two-layer perceptron.
    """

    cond_pos_emb: torch.Tensor  # None without a decoder
    mask: torch.Tensor | None
    memory_mask: torch.Tensor | None

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        horizon: int,
        n_obs_steps: int | None = None,
        cond_dim: int = 0,
        n_layer: int = 12,
        n_head: int = 12,
        n_emb: int = 768,
        p_drop_emb: float = 0.1,
        p_drop_attn: float = 0.1,
        causal_attn: bool = False,
        time_as_cond: bool = True,
        obs_as_cond: bool = False,
        n_cond_layers: int = 0,
    ) -> None:
        super().__init__()
        self.obs_as_cond = cond_dim > 0
        if self.obs_as_cond and not time_as_cond:
            raise ValueError(
                f"cond_dim={cond_dim} with time_as_cond=False: the encoder-only model takes no observation condition; "
                "set cond_dim=0 or time_as_cond=True"
            )
        self.horizon = horizon
        encoder_only = not time_as_cond
        tokens = horizon + encoder_only  # the encoder-only model reads the timestep as its first token
        n_obs_tokens = (horizon if n_obs_steps is None else n_obs_steps) if self.obs_as_cond else 0
        cond_tokens = time_as_cond + n_obs_tokens

        self.input_emb = nn.Linear(input_dim, n_emb)
        self.pos_emb = nn.Parameter(torch.zeros(1, tokens, n_emb))
        self.drop = nn.Dropout(p_drop_emb)
        self.time_emb = SinusoidalEmbedding(n_emb)
        self.cond_obs_emb = nn.Linear(cond_dim, n_emb) if self.obs_as_cond else None

        layer_settings: dict[str, Any] = {
            "d_model": n_emb,
            "nhead": n_head,
            "dim_feedforward": 4 * n_emb,
            "dropout": p_drop_attn,
            "activation": "gelu",
            "batch_first": True,
            "norm_first": True,
        }

        def encoder_stack(depth: int) -> nn.TransformerEncoder:
            # nested tensors do not apply to pre-norm layers; saying so here only spares a warning
            return nn.TransformerEncoder(
                nn.TransformerEncoderLayer(**layer_settings), depth, enable_nested_tensor=False
            )

        if encoder_only:
            self.register_parameter("cond_pos_emb", None)
            self.encoder: nn.Module = encoder_stack(n_layer)
            self.decoder: nn.TransformerDecoder | None = None
        else:
            self.cond_pos_emb = nn.Parameter(torch.zeros(1, cond_tokens, n_emb))
            if n_cond_layers > 0:
                self.encoder = encoder_stack(n_cond_layers)
            else:
                self.encoder = nn.Sequential(nn.Linear(n_emb, 4 * n_emb), nn.Mish(), nn.Linear(4 * n_emb, n_emb))
            self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**layer_settings), n_layer)

        step = torch.arange(tokens)[:, None]
        causal = causal_attn and self.obs_as_cond
        self.register_buffer("mask", _additive_mask(step >= step.T) if causal_attn else None)
        # condition token s > 0 is observation s - 1; the timestep (token 0) is visible to every trajectory step
        visible = step >= torch.arange(cond_tokens)[None, :] - 1
        self.register_buffer("memory_mask", _additive_mask(visible) if causal else None)

        self.ln_f = nn.LayerNorm(n_emb)
        self.head = nn.Linear(n_emb, output_dim)
        self._initialise()

    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def get_optim_groups(self, weight_decay: float) -> list[dict]:
        """Parameter groups: weight decay on matrices, none on biases, norms and position embeddings."""
        parameters = dict(sorted(self.named_parameters()))
        matrices = {name for name, p in parameters.items() if name.endswith("weight") and p.ndim == 2}
        return [
            {"params": [parameters[n] for n in parameters if n in matrices], "weight_decay": weight_decay},
            {"params": [parameters[n] for n in parameters if n not in matrices], "weight_decay": 0.0},
        ]

    def configure_optimizers(
        self,
        learning_rate: float = 1e-4,
        weight_decay: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> torch.optim.AdamW:
        return torch.optim.AdamW(self.get_optim_groups(weight_decay), lr=learning_rate, betas=betas)

    @program_stands_for
    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        cond: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict the noise.

        Args:
            sample: noisy trajectory [B, horizon, input_dim].
            timestep: diffusion timestep, one number for all samples or one each [B].
            cond: observations [B, n_obs_steps, cond_dim], if the model takes them.

        Returns:
            [B, horizon, output_dim]
        """
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        time_token = self.time_emb(timesteps).unsqueeze(1)  # [B, 1, n_emb]
        tokens = self.input_emb(sample)  # [B, T, n_emb]

        if self.decoder is None:
            tokens = torch.cat([time_token, tokens], dim=1)
            x = self.encoder(_embed(self.drop, tokens, self.pos_emb), mask=self.mask)[:, 1:]
        else:
            cond_tokens = time_token
            if self.cond_obs_emb is not None:
                cond_tokens = torch.cat([time_token, self.cond_obs_emb(cond)], dim=1)
            memory = self.encoder(_embed(self.drop, cond_tokens, self.cond_pos_emb))  # [B, 1 + n_obs_steps, n_emb]
            x = self.decoder(
                _embed(self.drop, tokens, self.pos_emb), memory, tgt_mask=self.mask, memory_mask=self.memory_mask
            )
        return self.head(self.ln_f(x))


def _embed(drop: nn.Module, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return drop(tokens + positions[:, : tokens.shape[1]])


def _additive_mask(visible: torch.Tensor) -> torch.Tensor:
    """0 where attention may look, -inf where it may not."""
    return torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))
