"""The forms in which a program runs: compiled code, a CUDA graph, or calls of PyTorch."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from bacinfer.core.engines.base import UnsupportedPolicyError
from bacinfer.core.engines.fused.cuda_graph import CapturedProgram
from bacinfer.core.engines.fused.native import NativeProgram
from bacinfer.core.engines.fused.native_library import NativeUnavailableError, native_library
from bacinfer.core.engines.fused.program import Program
from bacinfer.core.engines.sampling_call import SamplingCall

logger = logging.getLogger("bacinfer")


class Runner(Protocol):
    """A program in the form in which it runs; `buffer_bytes` is what its buffers take."""

    @property
    def buffer_bytes(self) -> int: ...

    def sample(self, call: SamplingCall) -> Tensor:
        """The denoised trajectory [B, T, A], which is the caller's own."""
        ...


def compiled_or_python(program: Program) -> Runner:
    """Compiled code where it can be had, otherwise calls of PyTorch, on any device and in any precision."""
    try:
        return NativeProgram(program)
    except NativeUnavailableError as error:
        if program.device.type == "cpu":
            _warn_once(f"programs run from Python, which is slower than compiled code: {error}")
        return program


BF16 = "bf16"

RUNNERS: Mapping[str, Callable[[Program], Runner]] = {"fused": compiled_or_python, "cuda_graph": CapturedProgram}
"""By the names of the engines."""


def fastest_on(device: torch.device) -> str:
    """The name of the runner for programs on a device."""
    return "cuda_graph" if device.type == "cuda" else "fused"


def make_runner(name: str, program: Program, precision: str | None) -> Runner:
    """A program in the form in which it runs.

    Args:
        name: A key of `RUNNERS`.
        precision: One of `PRECISIONS`; None: the policy's own.

    Raises:
        UnsupportedPolicyError: the program does not run in that precision.
    """
    if precision is None:
        return RUNNERS[name](program)
    if name == "cuda_graph":
        return CapturedProgram(program, halves=precision == BF16)
    try:
        return NativeProgram(program, precision=precision)
    except NativeUnavailableError as error:
        raise UnsupportedPolicyError(f"compiled code cannot run its program: {error}") from error


def check_device(name: str, device: torch.device, precision: str | None = None) -> None:
    """Raises UnsupportedPolicyError if programs cannot run so on a device."""
    if name == "cuda_graph" and device.type != "cuda":
        raise UnsupportedPolicyError(f"it is on {device}, and CUDA graphs need it on a CUDA device")
    if precision is None or (name == "cuda_graph" and precision == BF16):
        return
    if name != "fused" or device.type != "cpu":
        able = "the engine 'fused' on a CPU has"
        if precision == BF16:
            able = "the engines 'fused' on a CPU and 'cuda_graph' on a CUDA device have"
        raise UnsupportedPolicyError(f"{able} that; this is {name!r} on {device}")
    try:
        native_library()
    except NativeUnavailableError as error:
        raise UnsupportedPolicyError(f"it takes compiled code, and {error}") from error


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
