"""Recording: seeing every residual that a policy uses while it samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bacinfer.core.blocks import find_blocks
from bacinfer.core.engines.base import CACHE_ATTRIBUTE
from bacinfer.core.engines.eager import EagerEngine
from bacinfer.core.engines.trajectory import ResidualObserver
from bacinfer.core.handle import PolicyHandle
from bacinfer.core.schedule import CacheSchedule


@contextmanager
def observe_residuals(policy: Any, on_residual: ResidualObserver) -> Iterator[None]:
    """Within the block, each `predict_action` reports every residual block at every denoising step.

    Args:
        policy: A plain policy, or one that `apply_cache` runs in the eager engine; its actions stay the same (up to
            rounding where a layer's own forward is a fused kernel, as that of `nn.TransformerEncoderLayer`).
        on_residual: ``on_residual(block, step, residual)`` with the step index and the residual [B, T, D] that is
            used at that step: computed there, or stored where the schedule reuses it.

    Raises:
        RuntimeError: if the policy is observed already, or its cache runs in an engine that hides residuals.
    """
    handle = PolicyHandle.of(policy)
    applied = vars(handle.owner).get(CACHE_ATTRIBUTE)
    engine = applied.engine if applied is not None else _plain_engine(policy)
    if not isinstance(engine, EagerEngine):
        raise RuntimeError(f"residuals can be observed in the engine 'eager', the policy runs in {engine.name!r}")
    if engine.trajectory.observer is not None:
        raise RuntimeError("the residuals of this policy are being observed already")
    engine.trajectory.observer = on_residual
    if applied is None:
        engine.attach()
    try:
        yield
    finally:
        engine.trajectory.observer = None
        if applied is None:
            engine.detach()


def _plain_engine(policy: Any) -> EagerEngine:
    handle = PolicyHandle.of(policy)
    blocks = find_blocks(handle.model)
    schedule = CacheSchedule.every_step([block.key for block in blocks], handle.num_inference_steps)
    return EagerEngine(policy, blocks, schedule)
