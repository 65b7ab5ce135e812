"""FastWAM: an action expert that attends to a video expert's keys and values, each a transformer, in layers of both.

The video expert runs once a call, through the same layers as the denoising steps. While a plan is applied, the steps go
through modules that stand for a layer's work on actions alone. Each entry of a batch is denoised by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lerobot.policies.fastwam.configuration_fastwam import FastWAMConfig
from lerobot.policies.fastwam.modeling_fastwam import FastWAMPolicy
from lerobot.policies.fastwam.wan.modular import ActionDiT, FastWAM, MoTLayer
from lerobot.policies.fastwam.wan.video_dit import modulate
from torch import Tensor, nn

from bacinfer.core.blocks import ResidualBlock, register_layer
from bacinfer.core.handle import PolicyHandle
from bacinfer.core.patching import Patch, replaced_methods
from bacinfer.lerobot.first_chunk import FirstChunk
from bacinfer.lerobot.known_code import check_known


class ActionLayer(nn.Module):
    """One layer of the action expert at a denoising step, when the video's keys and values are known.

    Args:
        layer: The layer of both experts; no submodule of this one.
    """

    def __init__(self, layer: MoTLayer) -> None:
        super().__init__()
        self.block = layer.blocks["action"]
        self._layer = (layer,)

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        (layer,) = self._layer
        return MoTLayer._forward_action_cached(layer, x, **given)

    def self_attention(self, x: Tensor, freqs: Tensor, t_mod: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Gated, of actions to actions and to the video, whose keys and values are `k` and `v`."""
        (layer,) = self._layer
        query, key, value, _, gate, *_ = layer._build_expert_attention_io("action", x, freqs, t_mod)
        keys, values = torch.cat([k, key], dim=1), torch.cat([v, value], dim=1)
        mixed = layer._mixed_attention(query, keys, values, mask)
        return gate * self.block.project_self_attention_output(mixed)


class ActionExpert(nn.Module):
    """The action expert: its layers, and what comes before and after them."""

    def __init__(self, layers: Sequence[ActionLayer], around: ActionDiT) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.around = around  # whose own blocks lie in the layers of both experts


class _DenoisingStep(Patch):
    """A layer's work on actions, by the module that stands for it."""

    def __init__(self, layer: MoTLayer, action_layer: ActionLayer) -> None:
        super().__init__(layer, "_forward_action_cached")
        self.action_layer = action_layer

    def run(self, x: Tensor, **given: Any) -> Tensor:
        return self.action_layer(x, **given)


class _NumSteps(Patch):
    """What makes the steps of a call, of which it is told the configured number before a plan can say another one."""

    def __init__(self, scheduler: Any, config: FastWAMConfig) -> None:
        super().__init__(scheduler, "build_inference_schedule")
        self.config, self.configured = config, config.num_inference_steps

    def run(self, num_inference_steps: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if num_inference_steps == self.configured:
            num_inference_steps = self.config.num_inference_steps
        return self.original(num_inference_steps, *args, **kwargs)


def _self_attention(
    layer: ActionLayer,
    x: Tensor,
    freqs: Tensor,
    t_mod: Tensor,
    k_video: Tensor,
    v_video: Tensor,
    action_attention_mask: Tensor,
    **_: Any,
) -> Tensor:
    return layer.self_attention(x, freqs, t_mod, k_video, v_video, action_attention_mask)


def _cross_attention(layer: ActionLayer, x: Tensor, context_payload: dict[str, Tensor], **_: Any) -> Tensor:
    block = layer.block
    return block.apply_cross_attention(block.apply_norm3(x), context_payload["context"], context_payload["mask"])


def _feed_forward(layer: ActionLayer, x: Tensor, t_mod: Tensor, **_: Any) -> Tensor:
    block = layer.block
    *_, shift, scale, gate = block.split_modulation(block, t_mod)
    return gate * block.ffn(modulate(block.apply_norm2(x), shift, scale))


register_layer(
    ActionLayer,
    (
        ResidualBlock("sa_block", "block.self_attn", _self_attention, weights=("block.self_attn",)),
        ResidualBlock("mha_block", "block.cross_attn", _cross_attention, weights=("block.cross_attn",)),
        ResidualBlock("ff_block", "block.ffn", _feed_forward, weights=("block.ffn",)),
    ),
)

_TAKEN_APART = {
    FastWAM.infer_action: "2dc80484382be3d26158e04922219409",
    MoTLayer._forward_action_cached: "dea1e83656a6186325358597f920e2cc",
    MoTLayer._build_expert_attention_io: "c1489c44ae7ebfb33710c35d9249874a",
    MoTLayer._apply_expert_post_block: "d68f3b13f102c6f8a2524e74718fd35b",
}


def handle(policy: FastWAMPolicy) -> PolicyHandle:
    for function, digest in _TAKEN_APART.items():
        check_known(function, digest)
    model = policy.model
    for name in (name for layer in model.mot.layers for name in replaced_methods(layer)):
        raise ValueError(f"{name} of a layer of policy.model.mot was replaced by something else; undo that first")
    layers = [ActionLayer(layer) for layer in model.mot.layers]
    steps = [_DenoisingStep(layer, own) for layer, own in zip(model.mot.layers, layers, strict=True)]
    return PolicyHandle(
        ActionExpert(layers, model.action_expert),
        policy.config.num_inference_steps,
        (model, "infer_action"),
        "first block",
        FirstChunk(policy),
        patches=(*steps, _NumSteps(model.infer_action_scheduler, policy.config)),
        num_steps=(policy.config, "num_inference_steps"),
    )
