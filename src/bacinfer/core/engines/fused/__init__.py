"""The denoising loop as one static program: compiled from schedule, model and scheduler, and run in one piece.

From the bottom: `sampler` (what the scheduler does), `denoiser` (what the model is), `buffers`, `instructions`,
`program` (which of them in which order), `native` and `cuda_graph` (other ways to run them), `program_cache`, `engine`.
"""

from bacinfer.core.engines.fused.engine import AutoEngine, CudaGraphEngine, FusedEngine

__all__ = ["AutoEngine", "CudaGraphEngine", "FusedEngine"]
