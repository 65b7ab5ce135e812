"""GR00T N1.7: a diffusion transformer that attends to a vision-language model's features."""

from __future__ import annotations

from typing import Any

from lerobot.policies.groot.action_head.cross_attention_dit import BasicTransformerBlock
from lerobot.policies.groot.modeling_groot import GrootPolicy
from torch import Tensor

from bacinfer.core.blocks import ResidualBlock, register_layer
from bacinfer.core.handle import PolicyHandle
from bacinfer.lerobot.first_chunk import FirstChunk
from bacinfer.lerobot.known_code import check_known


def _attention(
    layer: Any,
    x: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    temb: Tensor | None = None,
) -> Tensor:
    y = layer.norm1(x, temb) if layer.norm_type == "ada_norm" else layer.norm1(x)
    if layer.pos_embed is not None:
        y = layer.pos_embed(y)
    mask = attention_mask if encoder_hidden_states is None else encoder_attention_mask
    y = layer.attn1(y, encoder_hidden_states=encoder_hidden_states, attention_mask=mask)
    return y if layer.final_dropout is None else layer.final_dropout(y)


def _feed_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return layer.ff(layer.norm3(x))


_BLOCKS = (
    ResidualBlock("sa_block", "attn1", _attention, weights=("attn1",)),
    ResidualBlock("ff_block", "ff", _feed_forward, weights=("ff",)),
)


def handle(policy: GrootPolicy) -> PolicyHandle:
    check_known(BasicTransformerBlock.forward, "7a1b7a3118e49df463394da85560a0d3")
    register_layer(BasicTransformerBlock, _BLOCKS)
    head = policy._groot_model.action_head
    return PolicyHandle(
        head.model,
        int(head.num_inference_timesteps),
        (head, "get_action_with_features"),
        act=FirstChunk(policy),
        num_steps=(head, "num_inference_timesteps"),
    )
