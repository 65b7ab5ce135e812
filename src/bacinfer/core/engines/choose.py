"""Which engine executes a schedule. A new engine is a file in this folder and a line here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bacinfer.core.blocks import Block
from bacinfer.core.engines.base import Engine, Phase, UnsupportedPolicyError
from bacinfer.core.engines.eager import EagerEngine
from bacinfer.core.engines.fused.engine import FusedEngine, cannot_run, log_eager
from bacinfer.core.engines.fused.native import PRECISIONS
from bacinfer.core.engines.fused.program_cache import ProgramCache
from bacinfer.core.engines.fused.runners import RUNNERS, fastest_on
from bacinfer.core.engines.onednn import OneDnnEngine

AUTO = "auto"
PROGRAM_ENGINES = tuple(RUNNERS)
LOSSLESS_ENGINES = (OneDnnEngine.name, *PROGRAM_ENGINES)
"""Engines that make a policy faster without any caching."""
_BY_ITS_OWN_CODE = {engine.name: engine for engine in (EagerEngine, OneDnnEngine)}
ENGINES = (AUTO, EagerEngine.name, *LOSSLESS_ENGINES)


def choose_engine(
    name: str, policy: Any, blocks: Sequence[Block], phases: Sequence[Phase], precision: str | None = None
) -> Engine:
    """The engine that runs the phases of a plan on a policy, which stays as it is until the engine is attached.

    Args:
        name: One of `ENGINES`. ``auto`` is the fastest that can run the policy where it is: a CUDA graph, a program, or
            the eager engine; a program only where every function that it replaces is one that it was written for.
            ``onednn`` is chosen by name alone, as it is faster on some processors only.
        policy: The policy or its handle.
        precision: Of products, one of `PRECISIONS`, which ``auto`` then finds or refuses; None: the policy's own.

    Raises:
        ValueError: there is no such engine or precision, or it cannot run the policy.
    """
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}; there are {', '.join(ENGINES)}")
    check_is_precision(precision)
    if name in _BY_ITS_OWN_CODE:
        if precision is not None:
            raise ValueError(
                f"engine {name!r} computes blocks by the policy's own code, not in {precision!r}: choose another "
                f"engine, or leave precision out"
            )
        return _BY_ITS_OWN_CODE[name](policy, blocks, phases)
    eager = EagerEngine(policy, blocks, phases)
    programs = [ProgramCache(blocks, phase, known_functions_only=name == AUTO, precision=precision) for phase in phases]
    runner = None if name == AUTO else name
    if runner is None and precision is not None:  # what was asked for is no longer left to what can be had
        runner = fastest_on(next(eager.handle.model.parameters()).device)
    try:
        return FusedEngine(eager, programs, runner)
    except UnsupportedPolicyError as error:
        obstacle = str(error)
        if runner is not None:
            raise ValueError(cannot_run(runner, obstacle, precision)) from error
        log_eager(obstacle)
        eager.reason = f"chosen by 'auto', as {obstacle}"
        return eager


def check_is_precision(precision: str | None) -> None:
    """Raises ValueError unless it is one of `PRECISIONS`, or None: the policy's own."""
    if precision not in (None, *PRECISIONS):
        raise ValueError(f"unknown precision {precision!r}; there is {', '.join(PRECISIONS)}, or None")
