"""How a schedule is executed. A new engine is one file here and one line in `ENGINES`."""

from __future__ import annotations

from bacinfer.core.engines.base import Engine
from bacinfer.core.engines.eager import EagerEngine
from bacinfer.core.engines.fused import AutoEngine, CudaGraphEngine, FusedEngine

__all__ = ["ENGINES", "LOSSLESS_ENGINES", "AutoEngine", "Engine"]

ENGINES: dict[str, type[Engine]] = {
    engine.name: engine for engine in (AutoEngine, EagerEngine, FusedEngine, CudaGraphEngine)
}
LOSSLESS_ENGINES = (FusedEngine.name, CudaGraphEngine.name)
"""Engines that make a policy faster without any caching."""
