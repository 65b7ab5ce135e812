"""A program captured as one CUDA graph: one launch for a whole denoising trajectory."""

from __future__ import annotations

import torch
from torch import Tensor

from bacinfer.core.engines.fused.program import Program
from bacinfer.core.engines.sampling_call import SamplingCall

_NUM_WARMUP_RUNS = 2  # libraries set up their workspaces before the capture


class CapturedProgram:
    """Runs a program's steps by replaying a graph; loading its arguments and drawing noise stay outside of it.

    So the caller's generator is honoured, and a replay reads and writes the same buffers every time.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(program.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_NUM_WARMUP_RUNS):
                    program.run()
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(self.graph):
                program.run()

    @property
    def buffer_bytes(self) -> int:
        return self.program.buffer_bytes

    def sample(self, call: SamplingCall) -> Tensor:
        """See `Program.sample`."""
        self.program.load(call)
        self.graph.replay()
        return self.program.buffers.trajectory.clone()
