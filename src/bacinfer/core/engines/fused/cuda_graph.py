"""A program captured as CUDA graphs: one launch for a whole denoising trajectory, and one for its noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bacinfer.core.engines.base import UnsupportedPolicyError
from bacinfer.core.engines.fused.kernel_program import KernelProgram, obstacle_to_kernels
from bacinfer.core.engines.fused.program import Program
from bacinfer.core.engines.sampling_call import SamplingCall

_NUM_WARMUP_RUNS = 2  # libraries set up their workspaces before the capture


class CapturedProgram:
    """Runs a program's steps by replaying a graph; loading its arguments stays outside of it.

    A replay reads and writes the same buffers every time. Noise from PyTorch's own generator is another graph; a
    caller's generator draws it outside of one.

    Args:
        program: On a CUDA device.
        halves: See `KernelProgram`.

    Raises:
        UnsupportedPolicyError: there are no kernels with `halves` for it.
    """

    def __init__(self, program: Program, *, halves: bool = False) -> None:
        obstacle = obstacle_to_kernels(program)
        if halves and obstacle:
            raise UnsupportedPolicyError(f"it takes the GPU kernels, and {obstacle}")
        self.program = program
        self._runs = program if obstacle else KernelProgram(program, halves=halves)
        with torch.cuda.device(program.device):
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
