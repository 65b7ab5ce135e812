"""VLA-JEPA: a diffusion transformer that attends to a vision-language model's action tokens."""

from __future__ import annotations

from typing import Any

from lerobot.policies.vla_jepa.action_head import BasicTransformerBlock
from lerobot.policies.vla_jepa.modeling_vla_jepa import VLAJEPAPolicy
from torch import Tensor

from bacinfer.core.blocks import ResidualBlock, register_layer
from bacinfer.core.handle import PolicyHandle
from bacinfer.lerobot.first_chunk import FirstChunk
from bacinfer.lerobot.known_code import check_known


def _attention(layer: Any, x: Tensor, encoder_hidden_states: Tensor | None, temb: Tensor) -> Tensor:
    context = encoder_hidden_states if layer.is_cross_attention else None
    return layer.attn1(layer.norm1(x, temb), encoder_hidden_states=context)


def _feed_forward(layer: Any, x: Tensor, encoder_hidden_states: Tensor | None, temb: Tensor) -> Tensor:
    return layer.ff(layer.norm2(x))


_BLOCKS = (
    ResidualBlock("sa_block", "attn1", _attention, weights=("attn1",)),
    ResidualBlock("ff_block", "ff", _feed_forward, weights=("ff",)),
)


def handle(policy: VLAJEPAPolicy) -> PolicyHandle:
    check_known(BasicTransformerBlock.forward, "c61c010391f2120c7a1a695f8219445d")
    register_layer(BasicTransformerBlock, _BLOCKS)
    head = policy.model.action_model
    return PolicyHandle(
        head.model,
        int(head.num_inference_timesteps),
        (head, "predict_action"),
        act=FirstChunk(policy),
        num_steps=(head, "num_inference_timesteps"),
    )
