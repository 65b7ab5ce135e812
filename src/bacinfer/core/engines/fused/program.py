"""A whole denoising trajectory as one static program: which instructions run, in which order, on which buffers.

A schedule is known before the loop starts, so everything about the loop is. What a step computes of it:

- a condition's token of the timestep is the same in every call of the policy, so it is computed once; those of the
  observations are the same in every step, so they are computed once a call; cross-attention keeps of both only what
  the trajectory's tokens meet (`FoldedTokens`); of adaLN's modulation the timestep's part is computed once, that of the
  observations once a call (`DiT`);
- the residuals of a run of blocks that are reused are added as one sum, and a step at which no block updates adds one
  stored total;
- the scheduler's arithmetic has its coefficients as numbers, and all noise is drawn before the loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from bacinfer.core.engines.base import UnsupportedPolicyError
from bacinfer.core.engines.fused import instructions as op
from bacinfer.core.engines.fused.buffers import Buffers
from bacinfer.core.engines.fused.constants import Constants
from bacinfer.core.engines.fused.denoiser import FeedForwardWeights, SelfAttentionWeights
from bacinfer.core.engines.fused.dit import DiT
from bacinfer.core.engines.sampling_call import SamplingCall


class Program:
    """One trajectory.

    Args:
        constants: What it shares with the programs of other batches.
        call: What it is compiled for: the shapes of its arguments, and whether part of the trajectory is given, which
            is then painted in before every step.

    Attributes:
        blocks: The instruction that computes each block.
        instructions: All instructions of the K steps, in their order.
    """

    def __init__(self, constants: Constants, call: SamplingCall) -> None:
        self.constants = constants
        self.buffers = Buffers(constants, call)
        self.blocks = block_instructions(constants, self.buffers)
        observing = condition_instructions(constants, self.buffers)
        trajectory = trajectory_instructions(
            constants, self.blocks, paints=self.buffers.paints, observes=self.buffers.condition is not None
        )
        self.instructions = [*observing, *trajectory]

    @property
    def device(self) -> torch.device:
        return self.buffers.device

    @property
    def buffer_bytes(self) -> int:
        return self.buffers.num_bytes

    def sample(self, call: SamplingCall) -> Tensor:
        """The denoised trajectory [B, T, A], which is the caller's own."""
        self.load(call)
        self.run()
        return self.buffers.trajectory.clone()

    def load(self, call: SamplingCall) -> None:
        """Puts the arguments in place, and draws the noise."""
        self.buffers.load(call)
        self.draw(call.generator)

    def draw(self, generator: torch.Generator | None) -> None:
        """Draws the noise of all steps, as they add it."""
        self.buffers.draw(generator)
        self.buffers.noise.mul_(self.constants.sigmas)

    def run(self) -> None:
        """Denoises what was loaded, in place."""
        self.encode_condition()
        for instruction in self.instructions:
            instruction.run(self.buffers)

    def encode_condition(self) -> None:
        """What is made of the condition before the instructions that take it from there."""
        denoiser, buffers = self.constants.denoiser, self.buffers
        if isinstance(denoiser, DiT):
            if buffers.condition is not None:
                buffers.encoded.copy_(F.silu(buffers.condition))
            return
        if denoiser.encoder_only or self.constants.condition_maps:
            return
        model = denoiser.model
        observed = None
        if buffers.condition is not None:
            positions = model.cond_pos_emb[:, 1 : buffers.num_condition_tokens]
            observed = model.cond_obs_emb(buffers.condition) + positions  # [B, J - 1, D]
        if self.constants.encoded_steps:
            tokens = self.constants.encoded_time_tokens.expand(-1, buffers.batch, -1, -1)  # [S, B, 1, D]
            if observed is not None:
                tokens = torch.cat([tokens, observed.expand(len(tokens), -1, -1, -1)], dim=2)
            buffers.encoded.copy_(model.encoder(tokens.flatten(0, 1)).view(tokens.shape))
        elif observed is not None:
            buffers.encoded.copy_(model.encoder(observed))


# -- compiling -------------------------------------------------------------------------------------------------------

BlockInstruction = op.SelfAttention | op.CrossAttention | op.FeedForward


def block_instructions(constants: Constants, buffers: Buffers) -> list[BlockInstruction]:
    """For each block the instruction that computes it."""
    blocks: list[BlockInstruction] = []
    for number, weights in enumerate(constants.weights):
        if isinstance(weights, SelfAttentionWeights):
            if weights.rotation is not None and weights.rotation.shape[1] < buffers.rows:
                raise UnsupportedPolicyError(
                    f"its rotations are of {weights.rotation.shape[1]} positions, the trajectory has {buffers.rows}"
                )
            blocks.append(op.SelfAttention(number, weights))
        elif isinstance(weights, FeedForwardWeights):
            blocks.append(op.FeedForward(number, weights))
        else:
            blocks.append(op.CrossAttention(number, weights, buffers.conditions[number]))
    return blocks


def condition_instructions(constants: Constants, buffers: Buffers) -> list[op.Instruction]:
    """What the condition passes, once for all steps."""
    condition, encoded, maps = buffers.condition, buffers.encoded, constants.condition_maps
    if condition is None or not maps:
        return []
    if isinstance(constants.denoiser, DiT):
        modulations = buffers.conditioned.flatten(2)
        return [op.Linear(part, encoded, modulation) for part, modulation in zip(maps, modulations, strict=True)]
    first, inner, last = maps
    positions = constants.denoiser.model.cond_pos_emb[:, 1 : buffers.num_condition_tokens]
    return [
        op.Linear(first, condition, encoded, added=positions.detach().repeat(buffers.batch, 1, 1)),
        op.Linear(inner, encoded, buffers.condition_hidden, activation=F.mish),
        op.Linear(last, buffers.condition_hidden, encoded),
    ]


def trajectory_instructions(
    constants: Constants, blocks: Sequence[BlockInstruction], *, paints: bool, observes: bool
) -> list[op.Instruction]:
    """All instructions of the K steps; `paints` the given part in, `observes` if there is a condition besides time."""
    painting = [op.Paint()] if paints else []
    instructions: list[op.Instruction] = []
    if observes and not constants.encoded_steps:  # each token is encoded by itself: those of the observations fold once
        crossing = [block for block in blocks if isinstance(block, op.CrossAttention)]
        instructions += [op.Fold(block.block, block.weights, block.condition, step=None, first=1) for block in crossing]
    for k in range(len(constants.sampler.steps)):
        instructions += [*painting, *_step(constants, blocks, k)]
    return [*instructions, *painting]


def _step(constants: Constants, blocks: Sequence[BlockInstruction], k: int) -> list[op.Instruction]:
    step = constants.sampler.steps[k]
    return [
        *map(op.Remember, step.keeps),
        *([op.SetTimeToken(constants.time_tokens[k])] if constants.denoiser.encoder_only else []),
        op.Embed(constants.input),
        *_stack(constants, blocks, k),
        op.Predict(constants.stack_norm, constants.final_norm, constants.head),
        # the steps that draw noise are the first ones: all, or all but the last
        op.Step(step, constants.sampler.clip, draw=k if step.draws_noise else None),
    ]


def _stack(constants: Constants, blocks: Sequence[BlockInstruction], k: int) -> list[op.Instruction]:
    """From the embedded tokens to the stack's output."""
    updating = [number for number, updates in enumerate(constants.updates[k]) if updates]
    if not updating:
        return [op.AddTotal()]
    instructions: list[op.Instruction] = []
    start = 0
    for number in updating:
        instructions += _add_residuals(start, number)
        instructions += _compute(constants, blocks[number], k)
        start = number
    instructions += _add_residuals(start, len(blocks))
    following = constants.updates[k + 1 : k + 2]
    if following and not any(following[0]):
        instructions.append(op.StoreTotal())
    return instructions


def _add_residuals(start: int, end: int) -> list[op.Instruction]:
    """Adds the residuals of the blocks start..end-1, if there are any."""
    return [op.AddResiduals(start, end)] if start < end else []


def _compute(constants: Constants, block: BlockInstruction, k: int) -> list[op.Instruction]:
    """A block that updates at step k, with the condition of that step, if it is one with a condition."""
    if constants.modulation is not None:
        return [op.Modulate(block.block, constants.modulation[k, block.block]), block]
    if not isinstance(block, op.CrossAttention):
        return [block]
    if not constants.encoded_steps:
        return [replace(block, time=constants.folded_time[block.block, k])]
    return [op.Fold(block.block, block.weights, block.condition, constants.encoded_steps.index(k), first=0), block]
