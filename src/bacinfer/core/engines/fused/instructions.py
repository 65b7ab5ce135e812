"""The instructions of a program: what each computes, on the program's buffers.

A `run` is a few calls of PyTorch, on any device and in any precision; `native` runs the same instructions in compiled
code. Both are exact: only the order in which floating-point numbers are added and multiplied differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from bacinfer.core.engines.denoising_steps import DenoisingStep, Keep
from bacinfer.core.engines.fused.affine import Affine
from bacinfer.core.engines.fused.buffers import Buffers, Condition
from bacinfer.core.engines.fused.denoiser import (
    CrossAttentionWeights,
    FeedForwardWeights,
    FoldedTokens,
    Norm,
    SelfAttentionWeights,
)


class Instruction(Protocol):
    def run(self, buffers: Buffers) -> None: ...


@dataclass(frozen=True)
class Linear:
    """Maps the last dimension of one tensor [B, ..., in] into another one, and activates the result or adds to it."""

    map: Affine
    source: Tensor
    target: Tensor
    activation: Callable[[Tensor], Tensor] | None = None
    added: Tensor | None = None

    def run(self, buffers: Buffers) -> None:
        target = self.map(self.source.flatten(0, -2), out=self.target.flatten(0, -2))
        if self.activation is not None:
            target.copy_(self.activation(target))
        if self.added is not None:
            self.target.add_(self.added)


@dataclass(frozen=True)
class Paint:
    """Puts the given part into the trajectory."""

    def run(self, buffers: Buffers) -> None:
        torch.where(buffers.is_given, buffers.given, buffers.trajectory, out=buffers.trajectory)


@dataclass(frozen=True)
class SetTimeToken:
    """The timestep [D] becomes the stack's first token."""

    token: Tensor

    def run(self, buffers: Buffers) -> None:
        buffers.embedded[:, 0] = self.token


@dataclass(frozen=True)
class Embed:
    """The trajectory's tokens become the stack's input."""

    input: Affine  # its bias is in `embedded`

    def run(self, buffers: Buffers) -> None:
        x = buffers.x
        tokens, embedded = buffers.tokens.view(len(x), -1), buffers.embedded.view(x.shape)
        torch.addmm(embedded, tokens, self.input.columns, out=x)


@dataclass(frozen=True)
class AddResiduals:
    """Adds the stored residuals of the blocks start..end-1, which follow each other, to x."""

    start: int
    end: int

    def run(self, buffers: Buffers) -> None:
        if self.end == self.start + 1:
            buffers.x.add_(buffers.residuals[self.start])
        else:
            buffers.x.add_(buffers.residuals[self.start : self.end].sum(0, dtype=buffers.dtype))


@dataclass(frozen=True)
class StoreTotal:
    """Stores the sum of all residuals, for steps at which no block updates."""

    def run(self, buffers: Buffers) -> None:
        torch.sum(buffers.residuals, 0, dtype=buffers.dtype, out=buffers.total)


@dataclass(frozen=True)
class AddTotal:
    """Adds that sum to x."""

    def run(self, buffers: Buffers) -> None:
        buffers.x.add_(buffers.total)


@dataclass(frozen=True)
class SelfAttention:
    """Computes a self-attention block of x, and stores its residual."""

    block: int
    weights: SelfAttentionWeights

    def run(self, buffers: Buffers) -> None:
        residual, rotation = buffers.residuals[self.block], self.weights.rotation
        self.weights.qkv(_branch_input(self.weights.norm, buffers), out=buffers.qkv)
        queries, keys, values = buffers.heads
        if rotation is not None:
            for x in (queries, keys):
                x.copy_(_rotated(x, rotation[:, : buffers.rows]))
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=buffers.mask)
        self.weights.out(mixed.transpose(1, 2).reshape(residual.shape), out=residual)
        _gate(residual, buffers)


@dataclass(frozen=True)
class FeedForward:
    """Computes a feed-forward block of x, and stores its residual."""

    block: int
    weights: FeedForwardWeights

    def run(self, buffers: Buffers) -> None:
        residual = buffers.residuals[self.block]
        hidden = self.weights.activation(self.weights.first(_branch_input(self.weights.norm, buffers)))
        self.weights.second(hidden, out=residual)
        _gate(residual, buffers)


def _branch_input(norm: Norm, buffers: Buffers) -> Tensor:
    """What a block computes its residual of [M, D], in the dtype of products."""
    x = norm(buffers.x)
    if buffers.modulation is None:
        return x
    shift, scale, _ = buffers.modulation.unsqueeze(2).unbind(1)  # [B, 1, D] each
    return (
        torch.addcmul(shift, x.view(buffers.batch, buffers.rows, -1), scale).view(x.shape).to(buffers.residuals.dtype)
    )


def _gate(residual: Tensor, buffers: Buffers) -> None:
    if buffers.modulation is not None:
        residual.view(buffers.batch, buffers.rows, -1).mul_(buffers.modulation[:, 2:])


def _rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """Queries or keys [B, H, N, D / H], rotated by their positions (RoPE; Su et al., 2021)."""
    cosines, sines = rotation
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-second, first], dim=-1) * sines


@dataclass(frozen=True)
class Modulate:
    """Brings shift, scale and gate of a block to another step."""

    block: int
    time: Tensor  # the timestep's part [3, D]

    def run(self, buffers: Buffers) -> None:
        torch.add(self.time, buffers.conditioned[self.block], out=buffers.modulation)


@dataclass(frozen=True)
class CrossAttention:
    """Computes a cross-attention block of x with the condition as it stands, and stores its residual.

    Args:
        time: The timestep's token (n = 1), if it is to be the condition's first one.
    """

    block: int
    weights: CrossAttentionWeights
    condition: Condition
    time: FoldedTokens | None = None

    def run(self, buffers: Buffers) -> None:
        if self.time is not None:
            _load(self.condition, self.time, first=0)
        batch, rows, tokens, heads = self.condition.offset.shape
        logits, values = self.condition.vectors.flatten(2, 3)  # [B, J H, D]
        x = self.weights.norm(buffers.x).view(batch, rows, -1)
        attention = torch.baddbmm(self.condition.offset.flatten(2), x, logits.transpose(1, 2))
        attention = attention.view(batch, rows, tokens, heads).softmax(2).flatten(2)
        residual = buffers.residuals[self.block].view(batch, rows, -1)
        torch.baddbmm(self.weights.out_bias, attention, values, out=residual)


@dataclass(frozen=True)
class Fold:
    """Folds encoded tokens into a block's condition, from its `first` token on.

    Args:
        step: Which of the encoded steps [S, B, J, D]; None where only observations are encoded [B, J - 1, D].
    """

    block: int
    weights: CrossAttentionWeights
    condition: Condition
    step: int | None
    first: int

    def tokens(self, buffers: Buffers) -> Tensor:
        """[B, n, D]"""
        return buffers.encoded if self.step is None else buffers.encoded[self.step]

    def run(self, buffers: Buffers) -> None:
        _load(self.condition, self.weights.fold(self.tokens(buffers).flatten(0, 1)), self.first)


def _load(condition: Condition, folded: FoldedTokens, first: int) -> None:
    """Puts tokens in place from `first` on: one batch entry's for all, or every entry's own."""
    _, batch, _, heads, width = condition.vectors.shape
    count = max(1, len(folded.offset) // batch)
    slots = slice(first, first + count)
    condition.vectors[:, :, slots] = folded.vectors.view(2, -1, count, heads, width)
    condition.offset[:, :, slots] = folded.offset.view(-1, 1, count, heads) + condition.mask[:, slots, None]


@dataclass(frozen=True)
class Predict:
    """The model's output from x."""

    stack_norm: Norm | None
    final_norm: Norm | None
    head: Affine

    def run(self, buffers: Buffers) -> None:
        x = buffers.x if self.stack_norm is None else self.stack_norm(buffers.x)
        x = x.to(buffers.output.dtype) if self.final_norm is None else self.final_norm(x)
        self.head(x, out=buffers.output)


@dataclass(frozen=True)
class Remember:
    """Keeps a part of the trajectory as it is (see `denoising_steps`)."""

    keep: Keep

    def run(self, buffers: Buffers) -> None:
        memory, x = buffers.kept[self.keep.memory], buffers.trajectory
        if self.keep.old == 0:  # whatever it held
            torch.mul(x, self.keep.new, out=memory)
        else:
            memory.mul_(self.keep.old).add_(x, alpha=self.keep.new)


@dataclass(frozen=True)
class Step:
    """The scheduler's step of the trajectory (see `sampler`)."""

    step: DenoisingStep
    clip: float | None
    draw: int | None  # which noise, already scaled

    def added(self, buffers: Buffers) -> Tensor | None:
        """[B, T, A]: noise, or what was kept."""
        if self.draw is not None:
            return buffers.noise[self.draw]
        return None if self.step.adds is None else buffers.kept[self.step.adds]

    def run(self, buffers: Buffers) -> None:
        step, x, y, x0 = self.step, buffers.trajectory, buffers.predicted, buffers.x0
        of_previous = x0 * step.f if step.f else None
        torch.mul(x, step.a, out=x0)
        x0.add_(y, alpha=step.b).div_(step.s)
        if self.clip is not None:
            x0.clamp_(-self.clip, self.clip)
        x.mul_(step.d).add_(x0, alpha=step.c)
        if step.e:
            x.add_(y, alpha=step.e)
        if of_previous is not None:
            x.add_(of_previous)
        added = self.added(buffers)
        if added is not None:
            x.add_(added)
