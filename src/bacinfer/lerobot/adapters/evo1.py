"""EVO1: a flow-matching head of cross-attention blocks, which its loop calls one by one."""

from __future__ import annotations

from typing import Any

from lerobot.policies.evo1.flow_matching import BasicTransformerBlock
from lerobot.policies.evo1.modeling_evo1 import Evo1Policy
from torch import Tensor

from bacinfer.core.blocks import ResidualBlock, register_layer
from bacinfer.core.handle import PolicyHandle
from bacinfer.lerobot.first_chunk import FirstChunk
from bacinfer.lerobot.known_code import check_known


def _cross_attention(layer: Any, x: Tensor, context: Tensor, time: Tensor, mask: Tensor | None = None) -> Tensor:
    return layer.attn(layer.norm1(x), context, context, key_padding_mask=mask)[0]


def _feed_forward(layer: Any, x: Tensor, context: Tensor, time: Tensor | None, mask: Tensor | None = None) -> Tensor:
    y = layer.norm2(x)
    return layer.ff(y if time is None else y + time.unsqueeze(1))


_BLOCKS = (
    ResidualBlock("mha_block", "attn", _cross_attention, weights=("attn",)),
    ResidualBlock("ff_block", "ff", _feed_forward, weights=("ff",)),
)


def handle(policy: Evo1Policy) -> PolicyHandle:
    check_known(BasicTransformerBlock.forward, "258eaadc757143be777a507a0c15be4f")
    register_layer(BasicTransformerBlock, _BLOCKS)
    head = policy.model.action_head
    K = int(head.num_inference_timesteps)
    num_steps = (head, "num_inference_timesteps")
    return PolicyHandle(head, K, (head, "get_action"), "first block", FirstChunk(policy), num_steps=num_steps)
