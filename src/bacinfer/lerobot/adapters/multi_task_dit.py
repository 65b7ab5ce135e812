"""Multi-task DiT: a diffusion transformer with adaLN, denoised by DDPM, DDIM or an integrator of flow matching."""

from __future__ import annotations

from typing import Any

import torch
from lerobot.policies.multi_task_dit.modeling_multi_task_dit import MultiTaskDiTPolicy, TransformerBlock, modulate
from lerobot.utils.constants import ACTION
from torch import Tensor

from bacinfer.core.blocks import ResidualBlock, register_layer
from bacinfer.core.handle import PolicyHandle
from bacinfer.lerobot.first_chunk import FirstChunk
from bacinfer.lerobot.known_code import check_known

_CALLS_A_STEP = {"euler": 1, "rk4": 4}


def _attention(layer: Any, x: Tensor, features: Tensor) -> Tensor:
    shift, scale, gate, *_ = _modulation(layer, features)
    y = modulate(layer.norm1(x), shift, scale)
    return gate * (layer.attn(y) if layer.use_rope else layer.multihead_attn(y, y, y)[0])


def _feed_forward(layer: Any, x: Tensor, features: Tensor) -> Tensor:
    *_, shift, scale, gate = _modulation(layer, features)
    return gate * layer.mlp(modulate(layer.norm2(x), shift, scale))


def _modulation(layer: Any, features: Tensor) -> list[Tensor]:
    """Shift, scale and gate of both blocks, [B, 1, D] each."""
    return [part.unsqueeze(1) for part in layer.adaLN_modulation(features).chunk(6, dim=1)]


# The gates are part of the residuals: most of the weights make them, so that applying them anew at each step, to a
# residual without them, would save next to nothing.
_BLOCKS = (
    ResidualBlock("sa_block", "norm1", _attention, weights=("adaLN_modulation",)),
    ResidualBlock("ff_block", "mlp", _feed_forward, weights=("mlp",)),
)


class _FirstChunk(FirstChunk):
    """Its `predict_action_chunk` reads observations from the queues, which `select_action` fills."""

    def sample(self, batch: dict[str, Any]) -> Tensor:
        action = self.policy.select_action(batch)
        return torch.stack([action, *self.policy._queues[ACTION]], dim=1)


def handle(policy: MultiTaskDiTPolicy) -> PolicyHandle:
    check_known(TransformerBlock.forward, "3b97597a76199467f0093840dfad701c")
    check_known(modulate, "169032f513fd78f016695732ee58e97b")
    register_layer(TransformerBlock, _BLOCKS)
    objective, config = policy.objective, policy.config
    sample = (objective, "conditional_sample")
    if config.is_diffusion:
        num_calls, num_steps = objective.num_inference_steps, (objective, "num_inference_steps")
        scheduler = (objective, "noise_scheduler")
    else:
        num_calls = config.num_integration_steps * _CALLS_A_STEP[config.integration_method]
        num_steps, scheduler = (objective.config, "num_integration_steps"), None
    return PolicyHandle(
        policy.noise_predictor,
        num_calls,
        sample,
        act=_FirstChunk(policy),
        num_steps=num_steps,
        scheduler=scheduler,
    )
