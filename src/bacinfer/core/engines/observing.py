"""Recording: seeing every residual that a policy uses while it samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bacinfer.core.blocks import Block, find_blocks
from bacinfer.core.engines.base import APPLIED, Engine, Phase
from bacinfer.core.engines.eager import EagerEngine
from bacinfer.core.engines.trajectory import ResidualObserver
from bacinfer.core.handle import PolicyHandle
from bacinfer.core.schedule import CacheSchedule


@contextmanager
def observe_residuals(
    policy: Any, on_residual: ResidualObserver, blocks: Sequence[Block] | None = None
) -> Iterator[None]:
    """Within the block, each sampling reports every residual block at every denoising step.

    Args:
        policy: A policy, plain or cached, or its handle; its actions stay the same up to rounding: layers run eagerly
            and block by block meanwhile.
        on_residual: ``on_residual(block, step, residual)`` with the step index and the residual [B, T, D] that is
            used at that step: computed there, or stored where the schedule reuses it.
        blocks: Other blocks of a plain policy's layers than those that `find_blocks` finds: computed in another way.

    Raises:
        RuntimeError: if the policy is observed already, or `blocks` are given for a policy to which a plan is applied.
    """
    handle = PolicyHandle.of(policy)
    applied = vars(handle.owner).get(APPLIED)
    if applied is not None and blocks is not None:
        raise RuntimeError("a plan is applied to this policy, which runs with its own blocks: remove it first")
    engine: Engine = applied.engine if applied is not None else _plain_engine(policy, blocks)
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


def _plain_engine(policy: Any, blocks: Sequence[Block] | None) -> EagerEngine:
    handle = PolicyHandle.of(policy)
    blocks = find_blocks(handle.model) if blocks is None else blocks
    schedule = CacheSchedule.every_step([block.key for block in blocks], handle.num_inference_steps)
    return EagerEngine(policy, blocks, [Phase(schedule)])
