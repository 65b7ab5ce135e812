"""Multi-task DiT: a diffusion transformer with adaLN, denoised by DDPM, DDIM or an integrator of flow matching."""

from __future__ import annotations

from typing import Any

import torch
from lerobot.policies.multi_task_dit.modeling_multi_task_dit import (
    DiffusionObjective,
    DiffusionTransformer,
    FlowMatchingObjective,
    MultiTaskDiTPolicy,
    RoPEAttention,
    RotaryPositionalEmbedding,
    SinusoidalPosEmb,
    TransformerBlock,
    modulate,
)
from lerobot.utils.constants import ACTION
from torch import Tensor, nn

from bacinfer.core.blocks import ResidualBlock, register_layer
from bacinfer.core.engines.denoising_steps import DenoisingSteps, euler_steps, runge_kutta_steps
from bacinfer.core.engines.loops import Loop
from bacinfer.core.engines.sampling_call import SamplingCall
from bacinfer.core.handle import PolicyHandle
from bacinfer.lerobot.first_chunk import FirstChunk
from bacinfer.lerobot.known_code import check_known, programs_stand_for


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


_IN_PROGRAMS = {  # what programs replace, and its text's digest
    DiffusionObjective.conditional_sample: "1748a247a48cc2c9699ae673a23befea",
    FlowMatchingObjective.conditional_sample: "9d27fbb9e27e12328330136e5ce477a9",
    FlowMatchingObjective._euler_integrate: "c690b59511ec32bff8737d703047645f",
    FlowMatchingObjective._rk4_integrate: "4f4db000d8ddf0a9360d27b152efa620",
    DiffusionTransformer.forward: "bffde3e4bd16b5a50c0b975f4892584a",
    SinusoidalPosEmb.forward: "4cc6155b169d3645f0cf328610c38b1b",
    TransformerBlock.forward: "3b97597a76199467f0093840dfad701c",
    RoPEAttention.forward: "ed3c83fd8f90ebdd063e3d169a5fc5ec",
    RotaryPositionalEmbedding.forward: "03f04f73a2801696686165a7e1b10ac1",
    RotaryPositionalEmbedding._rotate_half: "bed653c37c74d26f9e7adce4be587e60",
}


class _FirstChunk(FirstChunk):
    """Its `predict_action_chunk` reads observations from the queues, which `select_action` fills."""

    def sample(self, batch: dict[str, Any]) -> Tensor:
        action = self.policy.select_action(batch)
        return torch.stack([action, *self.policy._queues[ACTION]], dim=1)


class _DiffusionLoop(Loop):
    """`conditional_sample` of a diffusion objective, which is called with the model."""

    def __init__(self, policy: MultiTaskDiTPolicy) -> None:
        super().__init__(policy.objective)
        self.policy = policy

    @property
    def model(self) -> nn.Module:
        return self.policy.noise_predictor

    def read(self, model: nn.Module, batch_size: int, conditioning_vec: Tensor) -> SamplingCall | None:
        if model is not self.model:
            return None
        weight, objective = next(model.parameters()), self.owner
        given = weight.new_zeros(batch_size, objective.horizon, objective.action_dim)
        return SamplingCall(given, given.bool(), conditioning_vec, None, {})

    def arguments(self, call: SamplingCall) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (self.model, len(call.given), call.condition), {}


class _FlowLoop(_DiffusionLoop):
    """`conditional_sample` of a flow-matching objective."""

    functions = ("conditional_sample", "_euler_integrate", "_rk4_integrate")
    scheduler = None

    @property
    def calls_a_step(self) -> int:
        return 4 if self.owner.config.integration_method == "rk4" else 1

    @property
    def num_inference_steps(self) -> int:
        return self.owner.config.num_integration_steps * self.calls_a_step

    @num_inference_steps.setter
    def num_inference_steps(self, K: int) -> None:
        self.owner.config.num_integration_steps = K // self.calls_a_step

    def steps(self, num_inference_steps: int) -> DenoisingSteps:
        times = torch.linspace(0, 1, num_inference_steps // self.calls_a_step + 1)
        return euler_steps(times) if self.calls_a_step == 1 else runge_kutta_steps(times)

    def settings(self) -> dict[str, Any]:
        return {"method": self.owner.config.integration_method}

    def finish(self) -> None:
        pass


def handle(policy: MultiTaskDiTPolicy) -> PolicyHandle:
    check_known(TransformerBlock.forward, _IN_PROGRAMS[TransformerBlock.forward])
    check_known(modulate, "169032f513fd78f016695732ee58e97b")
    register_layer(TransformerBlock, _BLOCKS)
    programs_stand_for(_IN_PROGRAMS)
    objective = policy.objective
    if policy.config.is_diffusion:
        loop, num_steps = _DiffusionLoop(policy), (objective, "num_inference_steps")
        scheduler = (objective, "noise_scheduler")
    else:
        loop, num_steps, scheduler = _FlowLoop(policy), (objective.config, "num_integration_steps"), None
    return PolicyHandle(
        policy.noise_predictor,
        loop.num_inference_steps,
        (policy, "_generate_actions"),
        act=_FirstChunk(policy),
        num_steps=num_steps,
        scheduler=scheduler,
        loop=loop,
    )
