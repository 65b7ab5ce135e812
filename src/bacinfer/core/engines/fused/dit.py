"""The diffusion transformer of LeRobot's multi-task DiT, recognised by its structure, and what programs need of it.

Tokens of the noisy trajectory pass layers of self-attention and feed-forward whose normalised inputs are scaled and
shifted, and whose residuals are gated, by linear maps of what is known of the timestep and the observations (adaLN;
Peebles and Xie, 2023). Those are concatenated and activated number by number before each map, so that the map is a sum
of two: one of the timestep, the same in every call of the policy, and one of the observations, the same in every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bacinfer.core.blocks import Block
from bacinfer.core.engines.base import UnsupportedPolicyError
from bacinfer.core.engines.fused.affine import Affine
from bacinfer.core.engines.fused.denoiser import (
    FeedForwardWeights,
    Norm,
    SelfAttentionWeights,
    check_attention,
    check_class,
)

_ATTRIBUTES = ("time_mlp", "input_proj", "pos_embedding", "transformer_blocks", "output_proj")
_KINDS = ("sa_block", "ff_block")
NUM_MODULATIONS = 3  # of each block: shift, scale and gate


@dataclass(frozen=True)
class DiT:
    """A model that was recognised; see `Denoiser`."""

    model: Any
    blocks: tuple[Block, ...]

    encoder_only = False
    condition_is_token_wise = True
    stack_norm = final_norm = mask = memory_mask = None

    @property
    def weight(self) -> Tensor:
        return self.model.input_proj.weight

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def num_heads(self) -> int:
        return _attention(self.model.transformer_blocks[0]).num_heads

    @property
    def input(self) -> nn.Linear:
        return self.model.input_proj

    @property
    def positions(self) -> Tensor | None:
        return self.model.pos_embedding

    @property
    def head(self) -> nn.Linear:
        return self.model.output_proj

    def num_condition_tokens(self, condition: Tensor | None) -> int:
        """None: the condition is a vector."""
        return 0

    def takes(self, condition: Tensor | None) -> bool:
        return condition is not None

    def time_tokens(self, timesteps: Tensor) -> Tensor:
        """[K, 0]: the timestep is part of the modulation."""
        return self.weight.new_zeros(len(timesteps), 0)

    def block_weights(self, block: Block, dtype: torch.dtype) -> SelfAttentionWeights | FeedForwardWeights:
        layer: Any = block.layer
        if block.kind == "ff_block":
            first, activation, second = layer.mlp
            first, second = (Affine.of(linear.weight, linear.bias, dtype) for linear in (first, second))
            return FeedForwardWeights(self._norm(layer.norm2), first, activation, second)
        attention, norm = _attention(layer), self._norm(layer.norm1)
        out = Affine.of(attention.out_proj.weight, attention.out_proj.bias, dtype)
        if not layer.use_rope:
            return SelfAttentionWeights(norm, Affine.of(attention.in_proj_weight, attention.in_proj_bias, dtype), out)
        rope = attention.rope
        rotation = torch.stack([rope._cos_cached[0, 0], rope._sin_cached[0, 0]])  # [2, N, D / H]
        qkv = Affine.of(attention.qkv_proj.weight, attention.qkv_proj.bias, dtype)
        return SelfAttentionWeights(norm, qkv, out, rotation.to(dtype))

    def _norm(self, norm: nn.LayerNorm) -> Norm:
        return Norm(norm, self.weight.dtype)  # what is normalised is modulated before it is rounded

    # -- modulation ----------------------------------------------------------------------------------------------------

    @property
    def _maps(self) -> list[nn.Linear]:
        return [layer.adaLN_modulation[1] for layer in self.model.transformer_blocks]

    def _time_features(self, timesteps: Tensor) -> Tensor:
        return F.silu(self.model.time_mlp(timesteps))

    def modulation_by_time(self, timesteps: Tensor) -> Tensor:
        """The timesteps' part of the modulation, with the biases, and 1 added to the scales: [K, blocks, 3, D]."""
        features = self._time_features(timesteps)
        time_width = features.shape[-1]
        parts = [F.linear(features, linear.weight[:, :time_width], linear.bias) for linear in self._maps]
        modulation = torch.stack(parts, dim=1).view(len(timesteps), len(self.blocks), NUM_MODULATIONS, -1)
        modulation[:, :, 1] += 1
        return modulation

    def condition_maps(self, timesteps: Tensor) -> list[Affine]:
        """For each block, from the observations' activated features [B, C] to their part of its modulation [B, 3 D]."""
        time_width = self._time_features(timesteps).shape[-1]
        weights = [part for linear in self._maps for part in linear.weight[:, time_width:].chunk(len(_KINDS))]
        return [Affine.of(weight, None, weight.dtype) for weight in weights]


def is_dit(model: Any) -> bool:
    """Whether a model names its parts as this one does."""
    return all(hasattr(model, name) for name in _ATTRIBUTES)


def read_dit(model: Any, blocks: Sequence[Block]) -> DiT:
    """Recognises a model by its structure; raises UnsupportedPolicyError if it is built otherwise."""
    dit = DiT(model, tuple(blocks))
    for name in ("input_proj", "output_proj"):
        check_class(getattr(model, name), nn.Linear, name)
    if dit.input.in_features != dit.head.out_features:
        raise UnsupportedPolicyError("its model predicts something of another width than the trajectory")
    expected = [(layer, kind) for layer in model.transformer_blocks for kind in _KINDS]
    if [(block.layer, block.kind) for block in blocks] != expected:
        raise UnsupportedPolicyError(f"the residual blocks of its layers are not {' and '.join(_KINDS)}")
    for block in blocks[:: len(_KINDS)]:
        _check_layer(block.layer, block.layer_name, dit)
    return dit


def _check_layer(layer: Any, name: str, dit: DiT) -> None:
    width = dit.input.out_features
    for norm in ("norm1", "norm2"):
        check_class(getattr(layer, norm), nn.LayerNorm, f"{name}.{norm}")
        if getattr(layer, norm).elementwise_affine:
            raise UnsupportedPolicyError(f"its {name}.{norm} has weights beside those of the modulation")
    _check_sequential(layer.mlp, f"{name}.mlp", {0: nn.Linear, 2: nn.Linear}, length=3)
    _check_sequential(layer.adaLN_modulation, f"{name}.adaLN_modulation", {0: nn.SiLU, 1: nn.Linear}, length=2)
    if layer.adaLN_modulation[1].out_features != len(_KINDS) * NUM_MODULATIONS * width:
        raise UnsupportedPolicyError(f"its {name}.adaLN_modulation makes something else than shifts, scales and gates")
    attention = _attention(layer)
    if layer.use_rope:
        for part in ("qkv_proj", "out_proj"):
            check_class(getattr(attention, part), nn.Linear, f"{name}.attn.{part}")
        if attention.num_heads != dit.num_heads:
            raise UnsupportedPolicyError(f"its {name}.attn has another number of heads")
    else:
        check_attention(attention, f"{name}.multihead_attn", dit.num_heads)


def _attention(layer: Any) -> Any:
    return layer.attn if layer.use_rope else layer.multihead_attn


def _check_sequential(module: Any, name: str, parts: dict[int, type[nn.Module]], length: int) -> None:
    if not isinstance(module, nn.Sequential) or len(module) != length:
        raise UnsupportedPolicyError(f"its {name} is another module than expected")
    for index, expected in parts.items():
        check_class(module[index], expected, f"{name}.{index}")
