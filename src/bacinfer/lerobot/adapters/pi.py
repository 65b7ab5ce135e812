"""π0 and π0.5: an action expert of Gemma layers, with adaptive norms in π0.5, beside a PaliGemma."""

from __future__ import annotations

from typing import Any

from lerobot.policies.pi_gemma import _gated_residual
from torch import Tensor

from bacinfer.core.blocks import ResidualBlock, register_layer
from bacinfer.core.handle import PolicyHandle
from bacinfer.lerobot.first_chunk import FirstChunk
from bacinfer.lerobot.known_code import check_known


def _attention(layer: Any, x: Tensor, *args: Any, adarms_cond: Tensor | None = None, **kwargs: Any) -> Tensor:
    y, gate = layer.input_layernorm(x, cond=adarms_cond)
    y, _ = layer.self_attn(y, *args, **kwargs)
    return y if gate is None else y * gate


def _feed_forward(layer: Any, x: Tensor, *args: Any, adarms_cond: Tensor | None = None, **kwargs: Any) -> Tensor:
    y, gate = layer.post_attention_layernorm(x, cond=adarms_cond)
    y = layer.mlp(y)
    return y if gate is None else y * gate


_BLOCKS = (
    ResidualBlock("sa_block", "self_attn", _attention, weights=("self_attn",)),
    ResidualBlock("ff_block", "mlp", _feed_forward, weights=("mlp",)),
)


def handle(policy: Any) -> PolicyHandle:
    model = policy.model
    expert = model.paligemma_with_expert.gemma_expert.model
    layer = expert.layers[0]  # each model makes a layer class of its own
    check_known(type(layer).forward, "30b4efabba449ddec8d71005cee57982")
    check_known(_gated_residual, "448d8a1ffa3ce31b13c04739499db09e")
    register_layer(layer, _BLOCKS)
    return PolicyHandle(
        expert,
        policy.config.num_inference_steps,
        (model, "sample_actions"),
        act=FirstChunk(policy),
        num_steps=(model.config, "num_inference_steps"),
    )
