"""A whole denoising trajectory as one static program: which instructions run, in which order, on which buffers.

A schedule is known before the loop starts, so everything about the loop is. What a step computes of it:

- a condition's token of the timestep is the same in every call of the policy, so it is computed once; those of the
  observations are the same in every step, so they are computed once a call; cross-attention keeps of both only what
  the trajectory's tokens meet (`FoldedTokens`);
- the residuals of a run of blocks that are reused are added as one sum, and a step at which no block updates adds one
  stored total;
- the scheduler's arithmetic has its coefficients as numbers, and all noise is drawn before the loop.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bacinfer.core.engines.fused.buffers import Buffers, SamplingCall
from bacinfer.core.engines.fused.denoiser import (
    Affine,
    BlockWeights,
    CrossAttentionWeights,
    Denoiser,
    FeedForwardWeights,
    FoldedTokens,
    Norm,
    SelfAttentionWeights,
    block_weights,
    num_bytes,
)
from bacinfer.core.engines.fused.instructions import (
    AddResiduals,
    AddTotal,
    CrossAttention,
    Embed,
    FeedForward,
    Fold,
    Instruction,
    LoadTime,
    Paint,
    Predict,
    SelfAttention,
    SetTimeToken,
    Step,
    StoreTotal,
)
from bacinfer.core.engines.fused.sampler import Sampler
from bacinfer.core.schedule import CacheSchedule


class Constants:
    """What depends on the weights, the schedule and the timesteps alone, and is shared by the programs of all batches.

    Attributes:
        dtype: Of matrix products and stored residuals.
        updates: For each step, whether each block updates.
        time_tokens: The timesteps' tokens with their position, before a condition's encoder or the stack: [K, D].
        folded_time: Block and step to what the block sees of the timestep's token, where every call has the same.
    """

    def __init__(self, denoiser: Denoiser, schedule: CacheSchedule, sampler: Sampler, dtype: torch.dtype) -> None:
        model = denoiser.model
        self.denoiser = denoiser
        self.sampler = sampler
        self.dtype = dtype
        self.weights = [block_weights(block, dtype) for block in denoiser.blocks]
        self.updates = list(zip(*(schedule.update_mask(block.key) for block in denoiser.blocks), strict=True))
        self.input = Affine.of(model.input_emb.weight, None, model.pos_emb.dtype)  # its bias is in the positions
        norm = denoiser.stack.norm
        self.stack_norm = None if norm is None else Norm(norm, model.pos_emb.dtype)
        self.final_norm = Norm(model.ln_f, dtype)
        self.head = Affine.of(model.head.weight, model.head.bias, dtype)
        self.time_tokens = self._time_tokens()
        self.folded_time = self._fold_time_tokens()

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors, without the model's own."""
        return num_bytes([self.weights, self.input, self.head, self.time_tokens, self.folded_time])

    def _time_tokens(self) -> Tensor:
        model = self.denoiser.model
        timesteps = torch.tensor(self.sampler.timesteps, device=model.pos_emb.device)
        positions = model.pos_emb if self.denoiser.encoder_only else model.cond_pos_emb
        return model.time_emb(timesteps).to(positions.dtype) + positions[0, 0]

    def _fold_time_tokens(self) -> dict[tuple[int, int], FoldedTokens]:
        folded: dict[tuple[int, int], FoldedTokens] = {}
        if self.denoiser.encoder_only or not self.denoiser.condition_is_token_wise:
            return folded
        encoded = self.denoiser.model.encoder(self.time_tokens)
        for block, weights in enumerate(self.weights):
            if isinstance(weights, CrossAttentionWeights):
                steps = [k for k, updates in enumerate(self.updates) if updates[block]]
                tokens = weights.fold(encoded[steps])
                vectors = tokens.vectors.to(self.dtype)
                for i, k in enumerate(steps):
                    folded[block, k] = FoldedTokens(vectors[:, i : i + 1], tokens.offset[i : i + 1])
        return folded


class Program:
    """One trajectory.

    Args:
        constants: What it shares with the programs of other batches.
        call: What it is compiled for: the shapes of its arguments, and whether part of the trajectory is given, which
            is then painted in before every step.

    Attributes:
        instructions: All instructions of the K steps, in their order.
    """

    def __init__(self, constants: Constants, call: SamplingCall) -> None:
        self.constants = constants
        steps = constants.sampler.steps
        num_draws = sum(step.draws_noise for step in steps)
        self.buffers = Buffers(constants.denoiser, constants.dtype, num_draws, call)
        sigmas = [step.sigma for step in steps if step.draws_noise]
        self.sigmas = torch.tensor(sigmas, dtype=self.buffers.dtype, device=self.device).view(-1, 1, 1, 1)
        model = constants.denoiser.model
        self.conditions = {
            number: self.buffers.new_condition(weights, model.memory_mask, constants.dtype)
            for number, weights in enumerate(constants.weights)
            if isinstance(weights, CrossAttentionWeights)
        }
        needed = [
            k for k, updates in enumerate(constants.updates) if any(updates[number] for number in self.conditions)
        ]
        self.encoded_steps = {k: i for i, k in enumerate(needed)}  # where the condition's tokens are encoded together
        batch, num_tokens = self.buffers.batch, self.buffers.num_condition_tokens
        encoded = [len(needed), batch, num_tokens] if self._encodes_together else [batch, num_tokens - 1]
        self.buffers.encoded = self.buffers.new(*encoded, self.buffers.x.shape[-1])
        self.blocks = [self._block(number, weights) for number, weights in enumerate(constants.weights)]
        painting = [Paint()] if call.is_given.any() else []
        self.instructions: list[Instruction] = [
            *self._fold_observations(),
            *(instruction for k in range(len(steps)) for instruction in (*painting, *self._step(k))),
            *painting,
        ]

    @property
    def _encodes_together(self) -> bool:
        """The condition's tokens are encoded for all steps, since an encoder mixes them with the timestep's."""
        denoiser = self.constants.denoiser
        return not (denoiser.encoder_only or denoiser.condition_is_token_wise)

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
        self.buffers.noise.mul_(self.sigmas)

    def run(self) -> None:
        """Denoises what was loaded, in place."""
        self.encode_condition()
        for instruction in self.instructions:
            instruction.run(self.buffers)

    def encode_condition(self) -> None:
        """The part of the model before its transformer layers, once for all steps."""
        denoiser, model, buffers = self.constants.denoiser, self.constants.denoiser.model, self.buffers
        if denoiser.encoder_only:
            return
        observed = None
        if buffers.condition is not None:
            positions = model.cond_pos_emb[:, 1 : buffers.num_condition_tokens]
            observed = model.cond_obs_emb(buffers.condition) + positions  # [B, J - 1, D]
        if self._encodes_together:
            tokens = self.constants.time_tokens[list(self.encoded_steps), None, None]  # [S, 1, 1, D]
            tokens = tokens.expand(-1, buffers.batch, -1, -1)
            if observed is not None:
                tokens = torch.cat([tokens, observed.expand(len(tokens), -1, -1, -1)], dim=2)
            buffers.encoded.copy_(model.encoder(tokens.flatten(0, 1)).view(tokens.shape))
        elif observed is not None:
            buffers.encoded.copy_(model.encoder(observed))

    # -- compiling ---------------------------------------------------------------------------------------------------

    def _block(self, number: int, weights: BlockWeights) -> SelfAttention | CrossAttention | FeedForward:
        if isinstance(weights, SelfAttentionWeights):
            return SelfAttention(number, weights)
        if isinstance(weights, FeedForwardWeights):
            return FeedForward(number, weights)
        return CrossAttention(number, weights, self.conditions[number])

    def _fold_observations(self) -> list[Instruction]:
        """Where each token is encoded by itself, those of the observations are folded once a call."""
        if self.buffers.condition is None or self._encodes_together:
            return []
        blocks = [block for block in self.blocks if isinstance(block, CrossAttention)]
        return [Fold(block.block, block.weights, block.condition, step=None, first=1) for block in blocks]

    def _step(self, k: int) -> list[Instruction]:
        constants = self.constants
        step = constants.sampler.steps[k]
        return [
            *([SetTimeToken(constants.time_tokens[k])] if constants.denoiser.encoder_only else []),
            Embed(constants.input),
            *self._stack(k),
            Predict(constants.stack_norm, constants.final_norm, constants.head),
            # the steps that draw noise are the first ones: all, or all but the last
            Step(step, constants.sampler.clip, draw=k if step.draws_noise else None),
        ]

    def _stack(self, k: int) -> list[Instruction]:
        """From the embedded tokens to the stack's output."""
        updating = [number for number, updates in enumerate(self.constants.updates[k]) if updates]
        if not updating:
            return [AddTotal()]
        instructions: list[Instruction] = []
        ends = [
            *updating,
            len(self.blocks),
        ]  # of the runs of residuals that are added before each update, and at the end
        for start, end in zip([0, *ends], ends, strict=False):
            if start < end:
                instructions.append(AddResiduals(start, end))
            if end < len(self.blocks):
                instructions += [*self._condition_of(end, k), self.blocks[end]]
        following = self.constants.updates[k + 1 : k + 2]
        if following and not any(following[0]):
            instructions.append(StoreTotal())
        return instructions

    def _condition_of(self, number: int, k: int) -> list[Instruction]:
        """Brings the condition of a block that updates at step k there, if it is one with a condition."""
        block = self.blocks[number]
        if not isinstance(block, CrossAttention):
            return []
        if not self._encodes_together:
            return [LoadTime(number, block.condition, self.constants.folded_time[number, k])]
        return [Fold(number, block.weights, block.condition, self.encoded_steps[k], first=0)]
