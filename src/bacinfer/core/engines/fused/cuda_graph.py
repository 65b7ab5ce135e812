"""A program captured as CUDA graphs: one launch for a whole denoising trajectory, and one for its noise."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from bacinfer.core.engines.base import UnsupportedPolicyError
from bacinfer.core.engines.fused.kernel_program import KernelProgram, obstacle_to_kernels
from bacinfer.core.engines.fused.program import Program
from bacinfer.core.engines.sampling_call import SamplingCall

logger = logging.getLogger("bacinfer")

_NUM_WARMUP_RUNS = 2  # libraries set up their workspaces before the capture


class CapturedProgram:
    """Runs a program's steps by replaying a graph; loading its arguments stays outside of it.

    A replay reads and writes the same buffers every time. Noise from PyTorch's own generator is another graph; a
    caller's generator draws it outside of one.

    Args:
        program: On a CUDA device.
        halves: See `KernelProgram`.

    Raises:
        UnsupportedPolicyError: there are no kernels for it, and with `halves` it takes them.
    """

    def __init__(self, program: Program, *, halves: bool = False) -> None:
        self.program = program
        with torch.cuda.device(program.device):
            self._runs = _in_kernels(program, halves)
            self.graph = _captured(self._runs.run, _NUM_WARMUP_RUNS)
            self.noise = _captured(lambda: program.draw(None), 0)  # a run outside would draw from what comes after it

    @property
    def buffer_bytes(self) -> int:
        return self._runs.buffer_bytes

    def sample(self, call: SamplingCall) -> Tensor:
        """See `Program.sample`."""
        self.program.buffers.load(call)
        if call.generator is None:
            self.noise.replay()
        else:
            self.program.draw(call.generator)
        self.graph.replay()
        return self.program.buffers.trajectory.clone()


def _in_kernels(program: Program, halves: bool) -> KernelProgram | Program:
    """The program in kernels, or without them where it cannot be had in them."""
    obstacle = obstacle_to_kernels(program)
    if not obstacle:
        try:
            kernels = KernelProgram(program, halves=halves)
            kernels.run()  # which compiles them
            return kernels
        except Exception as error:  # of Triton, for many reasons: no C compiler, or a GPU that is too small for them
            obstacle = f"they could not be compiled: {error}"
            logger.warning(
                "a CUDA graph runs without GPU kernels, which takes two to three times as long: %s", obstacle
            )
    if halves:
        raise UnsupportedPolicyError(f"it takes GPU kernels, and {obstacle}")
    return program


def _captured(run: Callable[[], None], num_warmup_runs: int) -> torch.cuda.CUDAGraph:
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(num_warmup_runs):
            run()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        run()
    return graph
