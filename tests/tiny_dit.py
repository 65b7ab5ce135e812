"""A tiny diffusion transformer with adaLN, as LeRobot's multi-task DiT names its parts, in a policy like Diffusion
Policy's: what needs no lerobot about such networks is tested on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bacinfer import ResidualBlock, register_layer
from bacinfer.policies.reference import DiffusionTransformerLowdimPolicy

HORIZON, MOVES, CONDITION = 7, 2, 5


class Waves(nn.Module):
    """Of a timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("periods", 3.0 ** torch.arange(4), persistent=False)

    def forward(self, timestep: Tensor) -> Tensor:
        angles = timestep[:, None] / self.periods
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Rotation(nn.Module):
    """Rotates queries and keys [B, H, N, width] by angles that grow with their position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        angles = torch.arange(HORIZON)[:, None] / 7.0 ** torch.arange(width // 2)
        angles = torch.cat([angles, angles], dim=-1)[None, None]
        self.register_buffer("_cos_cached", angles.cos(), persistent=False)
        self.register_buffer("_sin_cached", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        cosine, sine = (part[..., : x.shape[2], : first.shape[-1]] for part in (self._cos_cached, self._sin_cached))
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


class RotaryAttention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv_proj, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.rope = Rotation(width // num_heads)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv_proj(x).chunk(3, dim=-1)
        )
        queries, keys = self.rope(queries), self.rope(keys)
        weights = (queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5).softmax(-1)
        return self.out_proj((weights @ values).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, width: int, num_heads: int, num_features: int, *, rotary: bool) -> None:
        super().__init__()
        self.use_rope = rotary
        if rotary:
            self.attn = RotaryAttention(width, num_heads)
        else:
            self.multihead_attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(num_features, 6 * width))

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        x = x + attention_residual(self, x, features)
        return x + feed_forward_residual(self, x, features)


def modulation(layer: Any, features: Tensor) -> tuple[Tensor, ...]:
    """Shift, scale and gate [B, 1, D] of self-attention, then those of the feed-forward block."""
    return layer.adaLN_modulation(features).unsqueeze(1).chunk(6, dim=-1)


def attention_residual(layer: Any, x: Tensor, features: Tensor) -> Tensor:
    shift, scale, gate = modulation(layer, features)[:3]
    x = layer.norm1(x) * (1 + scale) + shift
    return gate * (layer.attn(x) if layer.use_rope else layer.multihead_attn(x, x, x)[0])


def feed_forward_residual(layer: Any, x: Tensor, features: Tensor) -> Tensor:
    shift, scale, gate = modulation(layer, features)[3:]
    return gate * layer.mlp(layer.norm2(x) * (1 + scale) + shift)


register_layer(
    Layer,
    [
        ResidualBlock("sa_block", "norm1", attention_residual, weights=("adaLN_modulation",)),
        ResidualBlock("ff_block", "mlp", feed_forward_residual, weights=("mlp",)),
    ],
)


class TinyDiT(nn.Module):
    def __init__(self, width: int, num_heads: int, num_layers: int, *, rotary: bool, positions: bool) -> None:
        super().__init__()
        self.time_mlp = nn.Sequential(Waves(), nn.Linear(8, 6), nn.GELU())
        self.input_proj, self.output_proj = nn.Linear(MOVES, width), nn.Linear(width, MOVES)
        self.pos_embedding = nn.Parameter(torch.zeros(1, HORIZON, width)) if positions else None
        self.transformer_blocks = nn.ModuleList(
            Layer(width, num_heads, 6 + CONDITION, rotary=rotary) for _ in range(num_layers)
        )

    def forward(self, x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        features = torch.cat([self.time_mlp(timestep.expand(len(x))), condition], dim=-1)
        x = self.input_proj(x)
        if self.pos_embedding is not None:
            x = x + self.pos_embedding[:, : x.shape[1]]
        for layer in self.transformer_blocks:
            x = layer(x, features)
        return self.output_proj(x)


class TinyDiTPolicy(nn.Module):
    """Its actions are normalised ones, [-1, 1]."""

    conditional_sample = DiffusionTransformerLowdimPolicy.conditional_sample

    def __init__(self, scheduler: Any, num_inference_steps: int, **sizes: Any) -> None:
        super().__init__()
        self.model = TinyDiT(
            **{"width": 12, "num_heads": 2, "num_layers": 2, "rotary": True, "positions": True, **sizes}
        )
        self.noise_scheduler, self.num_inference_steps = scheduler, num_inference_steps

    def predict_action(self, observation: dict[str, Tensor]) -> dict[str, Tensor]:
        condition = observation["obs"]
        given = condition.new_zeros(len(condition), HORIZON, MOVES)
        return {"action_pred": self.conditional_sample(given, given.bool(), cond=condition)}


def tiny_dit_policy(scheduler: Any, num_inference_steps: int = 10, **sizes: Any) -> TinyDiTPolicy:
    """With random weights of the size that training starts from, which hardly magnify a difference of their inputs."""
    torch.manual_seed(0)
    policy = TinyDiTPolicy(scheduler, num_inference_steps, **sizes).eval()
    if policy.model.pos_embedding is not None:
        nn.init.normal_(policy.model.pos_embedding, std=0.5)
    return policy
