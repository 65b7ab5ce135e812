"""SmolVLA: an action expert of Llama layers, whose work its loop does itself, without calling them.

While a plan is applied, the denoising steps of that loop go through a module that has the layers as its own.
"""

from __future__ import annotations

from typing import Any

from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.policies.smolvla.smolvlm_with_expert import SmolVLMWithExpertModel
from torch import Tensor, nn

from bacinfer.core.blocks import ResidualBlock, register_layer
from bacinfer.core.handle import PolicyHandle
from bacinfer.core.patching import Patch, replaced_methods
from bacinfer.lerobot.first_chunk import FirstChunk
from bacinfer.lerobot.known_code import check_known


class ExpertLayer(nn.Module):
    """One layer of the action expert at a denoising step, when the keys and values of the prefix are known.

    Args:
        model: The vision-language model with its expert; no submodule of this one.
        index: Of the layer, among those of the vision-language model.
    """

    def __init__(self, model: SmolVLMWithExpertModel, index: int) -> None:
        super().__init__()
        self.layer = _layers(model)[1][index]
        self.index = index
        self._model = (model,)

    def forward(self, x: Tensor, mask: Tensor, positions: Tensor, prefix: Any) -> Tensor:
        for block in _BLOCKS:
            x = block.merge(self, x, block.residual(self, x, mask, positions, prefix))
        return x

    def attention(self, x: Tensor, mask: Tensor, positions: Tensor, prefix: Any) -> Tensor:
        (model,) = self._model
        every = model.self_attn_every_n_layers
        attends_to_prefix = "cross" in model.attention_mode and not (every > 0 and self.index % every == 0)
        forward = model.forward_cross_attn_layer if attends_to_prefix else model.forward_attn_layer
        head_dim = model.vlm.config.text_config.head_dim
        outputs, _ = forward(
            _layers(model),
            [None, x],
            self.index,
            positions,
            mask,
            x.shape[0],
            head_dim,
            use_cache=True,
            past_key_values=prefix,
        )
        project = self.layer.self_attn.o_proj
        return project(outputs[0].to(project.weight.dtype))


class Expert(nn.Module):
    """The action expert at a denoising step."""

    def __init__(self, model: SmolVLMWithExpertModel) -> None:
        super().__init__()
        _, expert_layers = _layers(model)
        self.layers = nn.ModuleList(
            ExpertLayer(model, index) for index, layer in enumerate(expert_layers) if layer is not None
        )
        self.norm = model.lm_expert.norm

    def forward(self, x: Tensor, mask: Tensor, positions: Tensor, prefix: Any) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask, positions, prefix)
        return self.norm(x)


class _DenoisingSteps(Patch):
    """The forward of the whole model, of which denoising steps go through `expert`."""

    def __init__(self, model: SmolVLMWithExpertModel, expert: Expert) -> None:
        super().__init__(model, "forward")
        self.expert = expert

    def run(
        self,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        use_cache: Any = None,
    ) -> Any:
        prefix, suffix = inputs_embeds
        if prefix is None and past_key_values is not None and use_cache:
            return [None, self.expert(suffix, attention_mask, position_ids, past_key_values)], past_key_values
        return self.original(attention_mask, position_ids, past_key_values, inputs_embeds, use_cache)


def _layers(model: SmolVLMWithExpertModel) -> list[list[Any]]:
    """The layers of the vision-language model and, beside each, that of the expert or None."""
    return model.get_model_layers([model.get_vlm_model().text_model, model.lm_expert])


def _attention(layer: ExpertLayer, x: Tensor, mask: Tensor, positions: Tensor, prefix: Any) -> Tensor:
    return layer.attention(x, mask, positions, prefix)


def _feed_forward(layer: ExpertLayer, x: Tensor, *args: Any) -> Tensor:
    return layer.layer.mlp(layer.layer.post_attention_layernorm(x))


def _add_in_residuals_precision(layer: nn.Module, x: Tensor, residual: Tensor, *args: Any) -> Tensor:
    """LeRobot adds x onto the residual in place, which keeps the residual's dtype."""
    return (x + residual).to(residual.dtype)


_BLOCKS = (
    ResidualBlock("sa_block", "layer.self_attn", _attention, _add_in_residuals_precision, weights=("layer.self_attn",)),
    ResidualBlock("ff_block", "layer.mlp", _feed_forward, _add_in_residuals_precision, weights=("layer.mlp",)),
)
register_layer(ExpertLayer, _BLOCKS)


def handle(policy: SmolVLAPolicy) -> PolicyHandle:
    model = policy.model.vlm_with_expert
    check_known(type(model).forward, "6f842def9b7a2ed75cce7029ca5c2430")
    if "forward" in replaced_methods(model):
        raise ValueError("policy.model.vlm_with_expert.forward was replaced by something else; undo that first")
    expert = Expert(model)
    return PolicyHandle(
        expert,
        policy.config.num_steps,
        (policy.model, "sample_actions"),
        act=FirstChunk(policy),
        patches=(_DenoisingSteps(model, expert),),
        num_steps=(policy.model.config, "num_steps"),
    )
