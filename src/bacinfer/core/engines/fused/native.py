"""Runs a program in compiled code (`native.cpp`), on the CPU in single precision, or with products in bfloat16 or int8.

The structs mirror those of the C++ source, in their order; before anything runs, their layouts are compared.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bacinfer.core.engines.fused import instructions as op
from bacinfer.core.engines.fused.affine import Affine, join_panels
from bacinfer.core.engines.fused.denoiser import CrossAttentionWeights, FeedForwardWeights, Norm
from bacinfer.core.engines.fused.native_library import NativeUnavailableError, native_library, openmp
from bacinfer.core.engines.fused.program import BlockInstruction, Program
from bacinfer.core.engines.sampling_call import SamplingCall


class _Norm(ctypes.Structure):
    _fields_ = (("weight", c_void_p), ("bias", c_void_p), ("epsilon", c_float))


class _Affine(ctypes.Structure):
    _fields_ = (("panels", c_void_p), ("in", c_int32), ("out", c_int32))


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("kind", "activation")),
        ("norm", _Norm),
        *((name, _Affine) for name in ("first", "second")),
        *((name, c_void_p) for name in ("query", "query_bias", "out", "out_bias", "mask", "vectors", "offset")),
        *((name, c_void_p) for name in ("rotation", "modulation")),
    )


class _Instruction(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("operation", "first", "last", "count")),
        ("coefficients", c_float * 7),
        *((name, c_void_p) for name in ("source", "offset", "target")),
        ("map", _Affine),
    )


_SIZES = ("batch", "rows", "horizon", "trajectory_width", "width", "hidden_width", "heads", "condition_tokens")
_BUFFERS = ("x", "embedded", "tokens", "residuals", "total", "qkv", "output", "x0", "kept", "given", "is_given")


class _Program(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in _SIZES),
        ("clip", c_float),
        ("precision", c_int32),
        *((name, c_void_p) for name in (*_BUFFERS, "hidden")),
        *((name, _Affine) for name in ("input", "head")),
        *((name, _Norm) for name in ("stack_norm", "final_norm")),
        *(("blocks", POINTER(_Block)), ("num_blocks", c_int64)),
        *(("instructions", POINTER(_Instruction)), ("num_instructions", c_int64)),
    )


_STRUCTS: tuple[type[ctypes.Structure], ...] = (_Norm, _Affine, _Block, _Instruction, _Program)

MULTIPLICATIONS_OF_A_THREAD = 1 << 15
"""A batch entry's in a product between two barriers, for every further thread that shares the entry. (16 rows: a second
thread gains nothing at a width of 32, and a sixth at 48.)"""

PRECISIONS = ("bf16", "int8")
"""Of the products with the weights of self-attention and feed-forward blocks, besides the policy's own."""
MOST_BYTES_OF_A_ROW = 1 << 16
"""Whose products' sum is below 2^31."""
_KINDS = (op.SelfAttention, op.CrossAttention, op.FeedForward)
_OPERATIONS: tuple[Any, ...] = (
    *(op.Paint, op.SetTimeToken, op.Embed, op.AddResiduals, op.StoreTotal, op.AddTotal),
    *(_KINDS, op.Fold, op.Predict, op.Step, op.Modulate, op.Linear, op.Remember),
)
_GELU_TANH = partial(F.gelu, approximate="tanh")
ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (F.gelu, F.relu, _GELU_TANH)
"""Of feed-forward blocks."""

_ACTIVATIONS = (*ACTIVATIONS, F.mish)


class NativeProgram:
    """A program in compiled code, on at most as many threads as PyTorch uses (`torch.set_num_threads`).

    Args:
        program: In single precision.
        precision: One of `PRECISIONS`, to which the weights of self-attention and feed-forward blocks, and what is
            multiplied with them, are rounded; sums stay in single precision, or are exact. None: single.

    Raises:
        NativeUnavailableError: if there is no compiled code for it here.
    """

    def __init__(self, program: Program, *, precision: str | None = None) -> None:
        _check(program)
        affines = _affines(program, precision)
        if any(which == "int8" and affine.weight.shape[1] > MOST_BYTES_OF_A_ROW for affine, which in affines):
            raise NativeUnavailableError(f"sums of more than {MOST_BYTES_OF_A_ROW} products of bytes might overflow")
        self._library = native_library()
        _check_structs(self._library)
        self.program = program
        self._precision = precision
        hidden_widths = [len(w.first.bias) for w in program.constants.weights if isinstance(w, FeedForwardWeights)]
        hidden_width = max(hidden_widths, default=0)
        self._hidden = program.buffers.x.new_zeros(len(program.buffers.x), hidden_width)
        join_panels(affines, self._library.panel_width())
        self._kept: list[Any] = []  # what the structs point to
        self._struct = self._encode()

    @property
    def buffer_bytes(self) -> int:
        return self.program.buffer_bytes + self._hidden.nbytes

    def sample(self, call: SamplingCall) -> Tensor:
        """See `Program.sample`."""
        self.program.load(call)
        self.run()
        return self.program.buffers.trajectory.clone()

    def run(self) -> None:
        """Denoises what was loaded, in place."""
        self.program.encode_condition()
        self._library.run(ctypes.byref(self._struct), self.num_threads, *openmp())

    @property
    def num_threads(self) -> int:
        """Those that its work is enough for: a few for each entry of its batch, as they have to wait for each other."""
        buffers = self.program.buffers
        multiplications = buffers.rows * buffers.x.shape[-1] ** 2  # of the smallest product with weights
        sharing = -(-multiplications // MULTIPLICATIONS_OF_A_THREAD)
        return min(torch.get_num_threads(), buffers.batch * sharing)

    # -- encoding ----------------------------------------------------------------------------------------------------

    def _encode(self) -> _Program:
        program, buffers, constants = self.program, self.program.buffers, self.program.constants
        blocks = (_Block * len(program.blocks))(*map(self._block, program.blocks))
        instructions = [self._instruction(instruction) for instruction in program.instructions]
        clip = constants.sampler.clip
        return _Program(
            batch=buffers.batch,
            rows=buffers.rows,
            horizon=buffers.horizon,
            trajectory_width=buffers.tokens.shape[-1],
            width=buffers.x.shape[-1],
            hidden_width=self._hidden.shape[1],
            heads=constants.denoiser.num_heads,
            condition_tokens=buffers.num_condition_tokens,
            clip=math.inf if clip is None else clip,
            precision=(None, *PRECISIONS).index(self._precision),
            **{name: self._pointer(getattr(buffers, name)) for name in _BUFFERS},
            hidden=self._pointer(self._hidden),
            input=self._affine(constants.input),
            head=self._affine(constants.head),
            stack_norm=self._norm(constants.stack_norm),
            final_norm=self._norm(constants.final_norm),
            blocks=blocks,
            num_blocks=len(blocks),
            instructions=(_Instruction * len(instructions))(*instructions),
            num_instructions=len(instructions),
        )

    def _pointer(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _norm(self, norm: Norm | None) -> _Norm:
        if norm is None:
            return _Norm()
        return _Norm(self._pointer(norm.module.weight), self._pointer(norm.module.bias), norm.module.eps)

    def _affine(self, affine: Affine, precision: str | None = None) -> _Affine:
        outputs, inputs = affine.weight.shape
        return _Affine(self._pointer(affine.panels(self._library.panel_width(), precision)), inputs, outputs)

    def _block(self, block: BlockInstruction) -> _Block:
        norm, modulation = self._norm(block.weights.norm), self._pointer(self.program.buffers.modulation)
        common = {"kind": _KINDS.index(type(block)), "norm": norm, "modulation": modulation}
        if isinstance(block, op.FeedForward):
            weights = block.weights
            activation = ACTIVATIONS.index(activation_of(weights.activation))
            first, second = (self._affine(part, self._precision) for part in (weights.first, weights.second))
            return _Block(activation=activation, first=first, second=second, **common)
        if isinstance(block, op.SelfAttention):
            mask, rotation = self._pointer(self.program.buffers.mask), self._rotation(block.weights.rotation)
            first, second = (self._affine(part, self._precision) for part in (block.weights.qkv, block.weights.out))
            return _Block(first=first, second=second, mask=mask, rotation=rotation, **common)
        parts: CrossAttentionWeights = block.weights
        return _Block(
            first=self._affine(parts.key_value),
            **{name: self._pointer(getattr(parts, name)) for name in ("query", "query_bias", "out", "out_bias")},
            **{name: self._pointer(getattr(block.condition, name)) for name in ("mask", "vectors", "offset")},
            **common,
        )

    def _rotation(self, rotation: Tensor | None) -> int | None:
        return self._pointer(None if rotation is None else rotation[:, : self.program.buffers.rows].contiguous())

    def _instruction(self, instruction: op.Instruction) -> _Instruction:
        operation = next(i for i, kinds in enumerate(_OPERATIONS) if isinstance(instruction, kinds))
        return _Instruction(operation=operation, **self._operands(instruction))

    def _operands(self, instruction: op.Instruction) -> dict[str, Any]:
        buffers = self.program.buffers
        if isinstance(instruction, op.SetTimeToken):
            return {"source": self._pointer(instruction.token)}
        if isinstance(instruction, op.AddResiduals):
            return {"first": instruction.start, "last": instruction.end}
        if isinstance(instruction, op.CrossAttention) and instruction.time is not None:
            vectors, offset = instruction.time.vectors, instruction.time.offset
            source = {"source": self._pointer(vectors), "offset": self._pointer(offset)}
            return {"first": instruction.block, "last": vectors.stride(0), **source}
        if isinstance(instruction, _KINDS):
            return {"first": instruction.block}
        if isinstance(instruction, op.Fold):
            tokens = instruction.tokens(buffers)
            operands = {"first": instruction.block, "last": instruction.first, "count": tokens.shape[1]}
            return {**operands, "source": self._pointer(tokens)}
        if isinstance(instruction, op.Modulate):
            source = {"source": self._pointer(instruction.time)}
            return {
                "first": instruction.block,
                **source,
                "offset": self._pointer(buffers.conditioned[instruction.block]),
            }
        if isinstance(instruction, op.Linear):
            activation, added = instruction.activation, self._pointer(instruction.added)
            return {
                "first": -1 if activation is None else _ACTIVATIONS.index(activation),
                "count": instruction.source[0].numel() // instruction.source.shape[-1],
                "source": self._pointer(instruction.source),
                "offset": added,
                "target": self._pointer(instruction.target),
                "map": self._affine(instruction.map),
            }
        if isinstance(instruction, op.Step):
            step = instruction.step
            coefficients = (c_float * 7)(step.a, step.b, 1 / step.s, step.c, step.d, step.e, step.f)
            return {"coefficients": coefficients, "source": self._pointer(instruction.added(buffers))}
        if isinstance(instruction, op.Remember):
            keep = instruction.keep
            return {"first": keep.memory, "coefficients": (c_float * 7)(keep.old, keep.new)}
        return {}


def _affines(program: Program, precision: str | None) -> list[tuple[Affine, str | None]]:
    """All that a program multiplies by, in the order of its blocks, each with its precision."""
    constants = program.constants
    parts = [
        (part, None if isinstance(weights, CrossAttentionWeights) else precision)
        for weights in constants.weights
        for part in vars(weights).values()
        if isinstance(part, Affine)
    ]
    maps = [(part, None) for part in (constants.input, *constants.condition_maps)]
    return [*maps, *parts, (constants.head, None)]


def _check_structs(library: ctypes.CDLL) -> None:
    """Raises NativeUnavailableError unless every struct has the same size, fields and offsets in compiled code."""
    library.structs.restype = ctypes.c_char_p
    compiled = library.structs().decode().splitlines()
    for struct, found in zip(_STRUCTS, compiled, strict=True):
        fields = [f"{name} {getattr(struct, name).offset}" for name, *_ in struct._fields_]
        expected = " ".join([struct.__name__.strip("_"), str(ctypes.sizeof(struct)), *fields])
        if found != expected:
            raise NativeUnavailableError(f"native.cpp has the struct {found!r}, where native.py has {expected!r}")


def _check(program: Program) -> None:
    """Raises NativeUnavailableError for what the compiled code cannot run."""
    constants = program.constants
    if program.device.type != "cpu" or constants.dtype != torch.float32 or program.buffers.dtype != torch.float32:
        raise NativeUnavailableError("it is for single precision on the CPU")
    obstacle = unknown_part(program)
    if obstacle:
        raise NativeUnavailableError(obstacle)


def unknown_part(program: Program) -> str:
    """Which part of a program's network neither compiled code nor kernels know; empty where they know all."""
    constants = program.constants
    norms = [constants.stack_norm, constants.final_norm]
    norms += [] if program.buffers.modulation is not None else [weights.norm for weights in constants.weights]
    if any(norm is not None and (norm.module.weight is None or norm.module.bias is None) for norm in norms):
        return "a layer normalisation has no weight or bias"
    for weights in constants.weights:
        if isinstance(weights, FeedForwardWeights) and activation_of(weights.activation) not in ACTIVATIONS:
            return f"the activation is {weights.activation}"
    return ""


def activation_of(activation: Any) -> Any:
    """The function that an activation module applies, where it is one of those."""
    if isinstance(activation, nn.GELU):
        return F.gelu if activation.approximate == "none" else _GELU_TANH
    return F.relu if isinstance(activation, nn.ReLU) else activation
