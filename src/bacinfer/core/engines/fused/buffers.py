"""The memory that a program runs in, allocated once for its batch."""

from __future__ import annotations

import torch
from torch import Tensor

from bacinfer.core.engines.denoising_steps import NUM_MEMORIES
from bacinfer.core.engines.fused.constants import Constants
from bacinfer.core.engines.fused.denoiser import CrossAttentionWeights
from bacinfer.core.engines.fused.dit import NUM_MODULATIONS, DiT
from bacinfer.core.engines.sampling_call import SamplingCall


class Condition:
    """What one cross-attention block sees of the condition at the current step.

    Attributes:
        vectors: [2, B, J, H, D], logits and values of the condition's tokens (see `FoldedTokens`).
        offset: [B, N, J, H], of the logits, with the mask.
        mask: [N, J].
    """

    def __init__(self, vectors: Tensor, offset: Tensor, mask: Tensor) -> None:
        self.vectors = vectors
        self.offset = offset
        self.mask = mask


class Buffers:
    """Shapes: B batch, T horizon, A trajectory width, D embedding width, H heads, J condition tokens; N tokens in the
    stack (T, or 1 + T where the timestep is a token), M = B N.

    Args:
        constants: Of the programs that run in them. Its dtype is that of products and stored residuals; all else has
            that of the model's weights.
        call: Of the shapes that the buffers are for.

    Attributes:
        paints: Whether a part of the trajectory is given.
        trajectory: [B, T, A], a view of `tokens` [B, N, A], in which a timestep's token is 0.
        predicted: [B, T, A], a view of `output` [M, A].
        embedded: [B, N, D], what every token is embedded as but for its values: bias, position, timestep.
        residuals: [blocks, M, D].
        x0: What the last step took the clean trajectory for [B, T, A].
        kept: What integrators of higher order keep between evaluations, [memories, B, T, A]; no memory for others.
        modulation: Shift, scale (with 1) and gate of the block that is computed, [B, 3, D]; None: there are none.
        conditioned: What the condition adds to those of each block, [blocks, B, 3, D].
        encoded: Tokens of the condition before they are folded: of the observations [B, J - 1, D], or those of the
            `Constants.encoded_steps` [S, B, J, D] where an encoder mixes them with the timestep's; a DiT's activated
            features [B, C].
        condition_hidden: Between the two maps of an encoder [B, J - 1, 4 D].
        conditions: What each cross-attention block sees of the condition, by the block's number.
    """

    def __init__(self, constants: Constants, call: SamplingCall) -> None:
        denoiser, dtype = constants.denoiser, constants.dtype
        self.num_bytes = 0
        self.dtype, self.device = denoiser.weight.dtype, denoiser.device
        self.batch, self.horizon, trajectory_width = call.given.shape
        self.rows = self.horizon + denoiser.encoder_only
        width, num_rows = denoiser.input.out_features, self.batch * self.rows
        condition = call.condition if denoiser.takes(call.condition) else None

        self.noise = self._new(len(constants.sigmas), self.batch, self.horizon, trajectory_width, dtype=dtype)
        self._draws = self.noise.unbind()
        self.paints = bool(call.is_given.any())
        self.given = self._new(self.batch, self.horizon, trajectory_width)
        self.is_given = torch.zeros(self.given.shape, dtype=torch.bool, device=self.device)
        self.condition = None if condition is None else self._new(*condition.shape)
        self.num_condition_tokens = denoiser.num_condition_tokens(self.condition)
        self.tokens = self._new(self.batch, self.rows, trajectory_width)
        self.trajectory = self.tokens[:, -self.horizon :]
        self.embedded = self._new(self.batch, self.rows, width)
        if denoiser.positions is not None:
            self.embedded += denoiser.positions[:, : self.rows]
        if denoiser.input.bias is not None:
            self.embedded[:, -self.horizon :] += denoiser.input.bias
        self.x = self._new(num_rows, width)
        self.residuals = self._new(len(denoiser.blocks), num_rows, width, dtype=dtype)
        self.total = self._new(num_rows, width)
        self.qkv = self._new(num_rows, 3 * width, dtype=dtype)
        self.output = self._new(num_rows, trajectory_width, dtype=dtype)
        self.predicted = self.output.view(self.batch, self.rows, -1)[:, -self.horizon :]
        self._zero = self.x.new_zeros(())
        self.x0 = self._new(self.batch, self.horizon, trajectory_width)
        keeps = any(step.keeps for step in constants.sampler.steps)
        self.kept = self._new(NUM_MEMORIES if keeps else 0, self.batch, self.horizon, trajectory_width)
        self.mask = None if denoiser.mask is None else denoiser.mask.to(dtype)
        self.heads = self.qkv.view(self.batch, self.rows, 3, denoiser.num_heads, -1).permute(2, 0, 3, 1, 4).unbind()
        tokens, num_steps = self.num_condition_tokens, len(constants.encoded_steps)
        if isinstance(denoiser, DiT):
            self.encoded = self._new(*(0, 0) if condition is None else condition.shape)
            hidden = 0
        else:
            shape = [num_steps, self.batch, tokens] if num_steps else [self.batch, max(0, tokens - 1)]
            self.encoded = self._new(*shape, width)
            hidden = len(constants.condition_maps[1].bias) if constants.condition_maps else 0
        self.condition_hidden = self._new(self.batch, max(0, tokens - 1), hidden)
        self.conditions = {
            number: self._new_condition(weights, denoiser.memory_mask, dtype)
            for number, weights in enumerate(constants.weights)
            if isinstance(weights, CrossAttentionWeights)
        }
        modulates = constants.modulation is not None
        self.modulation = self._new(self.batch, NUM_MODULATIONS, width) if modulates else None
        self.conditioned = self._new(len(denoiser.blocks) if modulates else 0, self.batch, NUM_MODULATIONS, width)

    def _new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        buffer = torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)
        self.num_bytes += buffer.nbytes
        return buffer

    def _new_condition(
        self, weights: CrossAttentionWeights, memory_mask: Tensor | None, dtype: torch.dtype
    ) -> Condition:
        heads, _, width = weights.query.shape
        tokens = self.num_condition_tokens
        mask = self.x.new_zeros(self.rows, tokens) if memory_mask is None else memory_mask[:, :tokens].contiguous()
        return Condition(
            self._new(2, self.batch, tokens, heads, width, dtype=dtype),
            self._new(self.batch, self.rows, tokens, heads, dtype=dtype),
            mask,
        )

    def load(self, call: SamplingCall) -> None:
        """Copies the arguments, and draws what the loop starts from."""
        self.trajectory.copy_(call.draw_noise() if call.start is None else call.start)
        if self.paints:
            self._copy_small_enough(call.given, self.given)
            self.is_given.copy_(call.is_given)
        if self.condition is not None and call.condition is not None:
            self._copy_small_enough(call.condition, self.condition)

    def draw(self, generator: torch.Generator | None) -> None:
        """Draws the noise of all steps, by the calls of the loop in their order."""
        for noise in self._draws:
            noise.normal_(generator=generator)

    def _copy_small_enough(self, x: Tensor, out: Tensor) -> None:
        """Copies x, but no number where the products of the plain policy might overflow.

        Programs group products otherwise, and keep a part of halves' in single precision: so they might not overflow
        there, and make a finite action of what the plain policy makes none of.
        """
        largest = torch.finfo(self.residuals.dtype).max ** 0.75  # which leaves 16 (halves) or 4e9 for the weights
        beyond = x * (torch.finfo(x.dtype).max / largest)  # infinite there, and so no number when it is multiplied by 0
        torch.addcmul(x, beyond, self._zero, out=out)
