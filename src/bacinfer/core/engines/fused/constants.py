"""What the programs of one schedule have in common, whatever their batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bacinfer.core.engines.denoising_steps import DenoisingSteps
from bacinfer.core.engines.fused.affine import Affine
from bacinfer.core.engines.fused.denoiser import (
    CrossAttentionWeights,
    FoldedTokens,
    Norm,
    num_bytes,
)
from bacinfer.core.engines.fused.dit import DiT
from bacinfer.core.engines.fused.networks import Network
from bacinfer.core.schedule import CacheSchedule


class Constants:
    """What depends on the weights, the schedule and the timesteps alone, and is shared by the programs of all batches.

    Attributes:
        dtype: Of matrix products and stored residuals.
        updates: For each step, whether each block updates.
        time_tokens: The timesteps' tokens with their position, before a condition's encoder or the stack: [K, D].
            Of width 0 where the timestep is part of the modulation.
        modulation: What the timesteps add to each block's shift, scale and gate [K, blocks, 3, D]; None: it has none.
        condition_maps: What the condition passes, once a call: of tokens, from numbers to tokens and through an encoder
            of two maps; of a DiT, to each block's modulation. Empty where PyTorch encodes it.
        folded_time: Block and step to what the block sees of the timestep's token, where every call has the same.
        encoded_steps: The steps at which some block sees the condition, where an encoder mixes its tokens with the
            timestep's, so that they are encoded for these steps together; none otherwise.
        encoded_time_tokens: The timesteps' tokens at these steps [S, 1, 1, D].
        sigmas: Of the noise that is drawn, [draws, 1, 1, 1].
    """

    def __init__(self, denoiser: Network, schedule: CacheSchedule, sampler: DenoisingSteps, dtype: torch.dtype) -> None:
        self.denoiser = denoiser
        self.sampler = sampler
        self.dtype = dtype
        self.weights = [denoiser.block_weights(block, dtype) for block in denoiser.blocks]
        self.updates = list(zip(*(schedule.update_mask(block.key) for block in denoiser.blocks), strict=True))
        weight = denoiser.weight
        self.input = Affine.of(denoiser.input.weight, None, weight.dtype)  # its bias is in the positions
        self.stack_norm = None if denoiser.stack_norm is None else Norm(denoiser.stack_norm, weight.dtype)
        self.final_norm = None if denoiser.final_norm is None else Norm(denoiser.final_norm, dtype)
        self.head = Affine.of(denoiser.head.weight, denoiser.head.bias, dtype)
        timesteps = torch.tensor(sampler.timesteps, device=weight.device)
        self.time_tokens = denoiser.time_tokens(timesteps)
        self.modulation = denoiser.modulation_by_time(timesteps) if isinstance(denoiser, DiT) else None
        self.condition_maps = self._map_condition(timesteps)
        self.folded_time = self._fold_time_tokens()
        self.encoded_steps = self._encoded_steps()
        self.encoded_time_tokens = self.time_tokens[list(self.encoded_steps), None, None]  # [S, 1, 1, D]
        sigmas = [step.sigma for step in sampler.steps if step.draws_noise]
        self.sigmas = torch.tensor(sigmas, dtype=weight.dtype, device=weight.device).view(-1, 1, 1, 1)

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors, without the model's own."""
        parts = [self.weights, self.input, self.head, self.condition_maps]
        return num_bytes([*parts, self.time_tokens, self.folded_time, self.modulation])

    def _map_condition(self, timesteps: Tensor) -> list[Affine]:
        denoiser = self.denoiser
        if isinstance(denoiser, DiT):
            return denoiser.condition_maps(timesteps)
        encoder, dtype = denoiser.model.encoder, denoiser.weight.dtype
        is_perceptron = isinstance(encoder, nn.Sequential) and [*map(type, encoder)] == [nn.Linear, nn.Mish, nn.Linear]
        if denoiser.encoder_only or denoiser.model.cond_obs_emb is None or not is_perceptron:
            return []
        return [Affine.of(part.weight, part.bias, dtype) for part in (denoiser.model.cond_obs_emb, *encoder[::2])]

    def _fold_time_tokens(self) -> dict[tuple[int, int], FoldedTokens]:
        folded: dict[tuple[int, int], FoldedTokens] = {}
        denoiser = self.denoiser
        if isinstance(denoiser, DiT) or denoiser.encoder_only or not denoiser.condition_is_token_wise:
            return folded
        encoded = denoiser.model.encoder(self.time_tokens)
        for block, weights in enumerate(self.weights):
            if isinstance(weights, CrossAttentionWeights):
                steps = [k for k, updates in enumerate(self.updates) if updates[block]]
                tokens = weights.fold(encoded[steps])
                vectors = tokens.vectors.to(self.dtype)
                for i, k in enumerate(steps):
                    folded[block, k] = FoldedTokens(vectors[:, i : i + 1], tokens.offset[i : i + 1])
        return folded

    def _encoded_steps(self) -> tuple[int, ...]:
        if self.denoiser.encoder_only or self.denoiser.condition_is_token_wise:
            return ()
        conditioned = [
            block for block, weights in enumerate(self.weights) if isinstance(weights, CrossAttentionWeights)
        ]
        return tuple(k for k, updates in enumerate(self.updates) if any(updates[block] for block in conditioned))
