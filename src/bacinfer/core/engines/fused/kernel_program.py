"""A program as launches of the kernels in `kernels`, on a GPU; of instructions that have none, as calls of PyTorch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

from bacinfer.core.engines.fused import instructions as op
from bacinfer.core.engines.fused.affine import Affine
from bacinfer.core.engines.fused.denoiser import Denoiser, FeedForwardWeights, Norm
from bacinfer.core.engines.fused.native import ACTIVATIONS, activation_of, unknown_part
from bacinfer.core.engines.fused.program import Program

Launch = Callable[[], Any]
_Instruction = TypeVar("_Instruction")

MAX_ROWS = 128
"""Of the tokens of all batch entries: with more, PyTorch's products are the faster ones."""

_MAX_WIDTH = 512  # of tokens: a kernel holds whole ones, and weights beside them
_MAX_TOKENS = 64  # of a batch entry: each attends to all
_MAX_PAIRS = 256  # of condition tokens and heads, likewise

# How kernels divide their work: the fastest of those that were tried on an H200.
_SMALLEST = 16  # side of a product's tile
_ROWS = 16
_COLUMNS = 16
_SLICES = 8  # of a sum
_SLICE_WIDTH = 128
_NUM_WARPS = 8


class KernelProgram:
    """What a program computes, in few launches.

    Args:
        program: One without an obstacle (see `obstacle_to_kernels`).
        halves: The products of self-attention and feed-forward blocks are of bfloat16 and add in single precision.
    """

    def __init__(self, program: Program, *, halves: bool = False) -> None:
        from bacinfer.core.engines.fused import kernels

        self.program = program
        self.buffers = program.buffers
        self._kernels = kernels
        self._halves: dict[int, Tensor] | None = {} if halves else None  # by the identity of an affine
        x = self.buffers.x
        feeds = [weights for weights in program.constants.weights if isinstance(weights, FeedForwardWeights)]
        inner = [len(weights.first.weight) for weights in feeds]
        self._hidden = x.new_empty(len(x) * max(inner, default=0), dtype=self.buffers.qkv.dtype)
        self._width = _sliced(x.shape[1])
        self._how = _how(program.device)
        self.launches = list(self._lower(deque(program.instructions)))

    @property
    def buffer_bytes(self) -> int:
        return self.program.buffer_bytes + self._hidden.nbytes

    def run(self) -> None:
        """Denoises what was loaded, in place."""
        self.program.encode_condition()
        for launch in self.launches:
            launch()

    def _lower(self, instructions: deque[op.Instruction]) -> Iterator[Launch]:
        while instructions:
            block = instructions[0]
            if isinstance(block, (op.SelfAttention, op.CrossAttention, op.FeedForward)):
                instructions.popleft()
                added: Any = instructions.popleft()  # its residual, and the stored ones of the blocks after it
                yield from self._block(block, count=added.end - added.start - 1)
            elif isinstance(block, (op.Predict, op.Paint, op.Embed)):
                yield self._between_steps(instructions)
            else:
                instructions.popleft()
                yield partial(block.run, self.buffers)

    # -- blocks ------------------------------------------------------------------------------------------------------

    def _block(self, block: Any, count: int) -> Iterator[Launch]:
        residual = self.buffers.residuals[block.block :]
        into = (self.buffers.x, residual, count, residual.stride(0))
        if isinstance(block, op.SelfAttention):
            yield self._norm_linear(block.weights.norm, block.weights.qkv, self.buffers.qkv, None)
            yield self._attend(block, into)
        elif isinstance(block, op.FeedForward):
            activation = activation_of(block.weights.activation)
            yield self._norm_linear(block.weights.norm, block.weights.first, self._hidden, activation)
            yield self._linear(block.weights.second, into)
        else:
            yield self._cross_attend(block, into)

    def _norm_linear(self, norm: Norm, affine: Affine, out: Tensor, activation: Any) -> Launch:
        x, outputs = self.buffers.x, len(affine.weight)
        grid = (_tiles(len(x), _ROWS), _tiles(outputs, _COLUMNS))
        number = self._kernels.NO_ACTIVATION if activation is None else 1 + ACTIVATIONS.index(activation)
        return self._launch(
            "norm_linear", grid, x, *_norm(norm, x), self._weight(affine), affine.bias, out, len(x), x.shape[1],
            outputs, ACTIVATION=number, ROWS=_ROWS, COLUMNS=_COLUMNS, **self._width,
        )  # fmt: skip

    def _linear(self, affine: Affine, into: Any) -> Launch:
        x, residual, *more = into
        (num_rows, width), inputs = x.shape, affine.weight.shape[1]
        grid = (_tiles(num_rows, _ROWS), _tiles(width, _COLUMNS))
        return self._launch(
            "linear", grid, self._hidden, self._weight(affine), affine.bias, x, residual, num_rows, width, *more,
            INPUTS=inputs, ROWS=_ROWS, COLUMNS=_COLUMNS, **_sliced(inputs),
        )  # fmt: skip

    def _attend(self, block: op.SelfAttention, into: Any) -> Launch:
        x, residual, *more = into
        buffers, out = self.buffers, block.weights.out
        heads, head_width = buffers.heads[0].shape[1], buffers.heads[0].shape[3]
        mask = buffers.qkv if buffers.mask is None else buffers.mask  # any pointer where there is none
        return self._launch(
            "attend", (buffers.batch, _tiles(x.shape[1], _COLUMNS)), buffers.qkv, mask, self._weight(out), out.bias, x,
            residual, buffers.rows, head_width, x.shape[1], *more, head_width**-0.5,
            HEADS=heads, GROUP=math.gcd(heads, 4), TOKENS=_power(buffers.rows), K=_power(head_width), COLUMNS=_COLUMNS,
            MASKED=buffers.mask is not None,
        )  # fmt: skip

    def _cross_attend(self, block: op.CrossAttention, into: Any) -> Launch:
        x, residual, *more = into
        condition, time, width = block.condition, block.time, x.shape[1]
        _, batch, seen, heads, _ = condition.vectors.shape
        first: Any = condition if time is None else time
        seen_tile, heads_tile = _seen_and_heads(seen, heads)
        return self._launch(
            "cross_attend", (batch, 1), x, *_norm(block.weights.norm, x), condition.vectors, first.vectors,
            condition.offset, first.offset, condition.mask, block.weights.out_bias, residual, self.buffers.rows, seen,
            heads, width, *more, condition.vectors.stride(0), first.vectors.stride(0),
            SEEN=seen_tile, HEADS=heads_tile, TOKENS=_power(self.buffers.rows), TIMED=time is not None, **self._width,
        )  # fmt: skip

    # -- between them ------------------------------------------------------------------------------------------------

    def _between_steps(self, instructions: deque[op.Instruction]) -> Launch:
        """A launch for what is at hand of: the model's output and the scheduler's step, painting, the next input."""
        buffers, constants = self.buffers, self.program.constants
        predict, step = _take(instructions, op.Predict), _take(instructions, op.Step)
        paints, embed = _take(instructions, op.Paint) is not None, _take(instructions, op.Embed)
        added: Any = embed and (_take(instructions, op.AddResiduals) or _take(instructions, op.AddTotal))
        addends, count = buffers.residuals, 0
        if isinstance(added, op.AddTotal):
            addends, count = buffers.total[None], 1
        elif added:
            addends, count = buffers.residuals[added.start :], added.end - added.start
        x, trajectory = buffers.x, buffers.trajectory
        numbers = [0.0 if step is None else float(getattr(step.step, name)) for name in "abscdef"]
        norms = (constants.stack_norm, constants.final_norm)
        clip, draw = (None, None) if step is None else (step.clip, step.draw)
        return self._launch(
            "between_steps", (_tiles(len(x), _ROWS), 1), x, *_norm(norms[0], x), *_norm(norms[1], x),
            constants.head.weight, constants.head.bias, trajectory, buffers.x0,
            x if draw is None else buffers.noise[draw], buffers.given, buffers.is_given.view(torch.int8),
            constants.input.columns, buffers.embedded, addends,
            len(x), x.shape[1], trajectory.shape[-1], *numbers, clip or 0.0, count, addends.stride(0),
            ROWS=_ROWS, SIZE=_power(trajectory.shape[-1]), STACK_NORM=norms[0] is not None, NORM=norms[1] is not None,
            PREDICTS=predict is not None, CLIPS=clip is not None, DRAWS=draw is not None, FOLLOWS=numbers[-1] != 0,
            PAINTS=paints, EMBEDS=embed is not None, **self._width,
        )  # fmt: skip

    def _launch(self, name: str, grid: tuple[int, int], *args: Any, **constants: Any) -> Launch:
        return partial(getattr(self._kernels, name)[grid], *args, **constants, **self._how)

    def _weight(self, affine: Affine) -> Tensor:
        if self._halves is None:
            return affine.columns
        if id(affine) not in self._halves:  # one for all steps
            self._halves[id(affine)] = affine.columns.to(torch.bfloat16)
        return self._halves[id(affine)]


def obstacle_to_kernels(program: Program) -> str:
    """Why there are no kernels for a program; empty where there are."""
    constants, buffers = program.constants, program.buffers
    num_rows, width = buffers.x.shape
    pairs = [math.prod(_seen_and_heads(*condition.vectors.shape[2:4])) for condition in buffers.conditions.values()]
    if find_spec("triton") is None:
        return "Triton is not installed"
    if not isinstance(constants.denoiser, Denoiser) or constants.denoiser.encoder_only:
        return "they are for transformers whose decoder layers see the timestep as a condition"
    if any(step.keeps for step in constants.sampler.steps):
        return "they know no integrators of higher order"
    if buffers.dtype == torch.float64:
        return "they are for single precision and halves"
    if num_rows > MAX_ROWS:
        return f"{num_rows} tokens of all batch entries are more than the {MAX_ROWS} that they are fast for"
    if width > _MAX_WIDTH or max(buffers.rows, buffers.trajectory.shape[-1]) > _MAX_TOKENS:
        return f"they hold {_MAX_TOKENS} tokens of {_MAX_WIDTH} numbers, the program has {buffers.rows} of {width}"
    if max(pairs, default=0) > _MAX_PAIRS:
        return f"its condition has more than {_MAX_PAIRS} pairs of tokens and heads"
    return unknown_part(program)


def _power(number: int, at_least: int = _SMALLEST) -> int:
    """The next power of two: what tiles measure."""
    return max(at_least, 1 << (number - 1).bit_length())


def _tiles(number: int, size: int) -> int:
    return -(-number // size)


def _sliced(number: int) -> dict[str, int]:
    """How a sum of so many numbers, or a part of it, is divided into slices."""
    total = min(_power(number), _SLICES * _SLICE_WIDTH)
    slices = min(_SLICES, total // _SMALLEST)
    return {"SLICES": slices, "K": total // slices}


def _seen_and_heads(seen: int, heads: int) -> tuple[int, int]:
    heads = _power(heads, at_least=1)
    return _power(seen, at_least=_SMALLEST // min(heads, _SMALLEST)), heads


def _norm(norm: Norm | None, otherwise: Tensor) -> tuple[Any, Any, float]:
    """Weight, bias and epsilon; any tensor where there is no normalisation."""
    return (otherwise, otherwise, 0.0) if norm is None else (norm.module.weight, norm.module.bias, norm.module.eps)


def _take(instructions: deque[op.Instruction], kind: type[_Instruction]) -> _Instruction | None:
    """The next instruction, if it is of that kind."""
    found = instructions[0] if instructions else None
    if not isinstance(found, kind):
        return None
    instructions.popleft()
    return found


def _how(device: torch.device) -> dict[str, Any]:
    """What all kernels are launched with on a device."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    overlaps = capability >= (9, 0)
    # three products of TensorFloat-32 make one of single precision, on the units that are made for products
    precision = "tf32x3" if capability >= (8, 0) else "ieee"
    launch = {"launch_pdl": True} if overlaps else {}
    return {"PRECISION": precision, "PDL": overlaps, "num_warps": _NUM_WARPS, **launch}
