"""X-VLA: a transformer over action, vision-language and soft-prompt tokens, which runs whole at each step."""

from __future__ import annotations

from typing import Any

from lerobot.policies.xvla.modeling_xvla import XVLAPolicy
from lerobot.policies.xvla.soft_transformer import TransformerBlock
from torch import Tensor

from bacinfer.core.blocks import ResidualBlock, register_layer
from bacinfer.core.handle import PolicyHandle
from bacinfer.lerobot.first_chunk import FirstChunk
from bacinfer.lerobot.known_code import check_known


def _attention(layer: Any, x: Tensor) -> Tensor:
    return layer.attn(layer.norm1(x))


def _feed_forward(layer: Any, x: Tensor) -> Tensor:
    return layer.mlp(layer.norm2(x))


_BLOCKS = (
    ResidualBlock("sa_block", "attn", _attention, weights=("attn",)),
    ResidualBlock("ff_block", "mlp", _feed_forward, weights=("mlp",)),
)


def handle(policy: XVLAPolicy) -> PolicyHandle:
    check_known(TransformerBlock.forward, "51dd5efd89b35f0bbc937fcbdd623cf6")
    register_layer(TransformerBlock, _BLOCKS)
    return PolicyHandle(
        policy.model.transformer,
        max(1, int(policy.config.num_denoising_steps)),
        (policy, "_get_action_chunk"),  # which tells the loop how many steps there are
        act=FirstChunk(policy),
        num_steps=(policy.config, "num_denoising_steps"),
    )
