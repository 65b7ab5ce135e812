"""FastDiffusionPolicy: one line to accelerate a policy, one to undo it, one to see what happens."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bacinfer.core.blocks import Block, find_blocks, num_weights
from bacinfer.core.cache_request import DEFAULT_METRIC, DEFAULT_THRESHOLD, Default, resolve_request
from bacinfer.core.engines import AUTO, ENGINES, LOSSLESS_ENGINES, Engine, choose_engine
from bacinfer.core.engines.base import CACHE_ATTRIBUTE
from bacinfer.core.optimal_steps import read_optimal_schedule
from bacinfer.core.schedule import CacheSchedule
from bacinfer.core.summary import BlockCounts, CacheSummary

DEFAULT_NUM_CACHES = Default(30)

_DEFAULTS = {
    "cache_threshold": DEFAULT_THRESHOLD,
    "num_caches": DEFAULT_NUM_CACHES,
    "metric": DEFAULT_METRIC,
    "num_bu_blocks": 0,
    "refresh_last_step": True,
}
"""What code may write out in any mode, as the signature says it."""


@dataclass
class _AppliedCache:
    """What a cached policy carries: the one object that its cache lives in."""

    mode: str
    schedule: CacheSchedule
    blocks: list[Block]
    engine: Engine
    warnings: tuple[str, ...]

    def install(self, policy: Any) -> None:
        self.engine.attach()
        setattr(policy, CACHE_ATTRIBUTE, self)
        policy.reset_cache = self.engine.begin

    def uninstall(self, policy: Any) -> None:
        self.engine.detach()
        delattr(policy, CACHE_ATTRIBUTE)
        del policy.reset_cache


class FastDiffusionPolicy:
    """Block-wise adaptive caching for a diffusion policy (BAC, arXiv 2506.13456)."""

    @staticmethod
    def apply_cache(
        policy: Any,
        cache_threshold: int = DEFAULT_THRESHOLD,
        optimal_steps_dir: str | Path | None = None,
        num_caches: int = DEFAULT_NUM_CACHES,
        metric: str = DEFAULT_METRIC,
        cache_mode: str | None = None,
        num_bu_blocks: int = 0,
        *,
        schedule: CacheSchedule | None = None,
        edit_steps: Sequence[int] | None = None,
        refresh_last_step: bool = True,
        engine: str = AUTO,
    ) -> Any:
        """Makes `policy` compute each residual block at its update steps only, in place; returns `policy`.

        A policy that is cached already gets the new cache instead. Steps are indices of the denoising loop: 0 is
        the noisiest, K-1 the last.

        Args:
            policy: Has `.model` (a module with transformer layers), `.num_inference_steps` and
                `.predict_action(obs_dict)`.
            cache_threshold: Mode 'threshold': all blocks update every `cache_threshold` steps; 5 by default.
            optimal_steps_dir: Mode 'optimal': ``assets/<task>/original/optimal_steps/<metric>``.
            num_caches: Mode 'optimal': M, the update steps of each block that were searched for; 30 by default. Mode
                'threshold', instead of `cache_threshold`: all blocks update every ⌈K / M⌉ steps.
            metric: Mode 'optimal': the similarity that was used.
            cache_mode: 'original' (no caching), 'threshold', 'optimal' or 'edit'; None means 'optimal' if
                `optimal_steps_dir` is given, otherwise 'threshold'.
            num_bu_blocks: Mode 'optimal': how many high-error blocks bubbling union extends.
            schedule: Runs this schedule, instead of a mode.
            edit_steps: Mode 'edit': the update steps of all blocks.
            refresh_last_step: Mode 'optimal': all blocks also update at the last step.
            engine: What executes the schedule: 'eager' patches the layers of any policy; 'fused' runs the whole
                denoising loop of Diffusion Policy's transformer policies as one program, and 'cuda_graph' as one
                CUDA graph; 'auto' is the fastest of them that can. With 'original', 'fused' and 'cuda_graph' run the
                plain policy without loss.

        Raises:
            TypeError: if the policy lacks what is said above.
            ValueError: if an argument is unknown, has no effect in the mode (its default may be written out), or does
                not fit the policy's K or blocks.
            FileNotFoundError: if there are no update steps as requested; says what is there.
        """
        _check_policy(policy)
        if engine not in ENGINES:
            raise ValueError(f"unknown engine {engine!r}; there are {', '.join(ENGINES)}")
        arguments = {
            "cache_threshold": cache_threshold,
            "optimal_steps_dir": optimal_steps_dir,
            "num_caches": num_caches,
            "metric": metric,
            "num_bu_blocks": num_bu_blocks,
            "schedule": schedule,
            "edit_steps": edit_steps,
            "refresh_last_step": refresh_last_step,
        }
        request = resolve_request(cache_mode, arguments, default_mode="threshold", harmless=_DEFAULTS.items())
        mode = request.mode
        if mode == "original" and engine not in LOSSLESS_ENGINES:
            return FastDiffusionPolicy.remove_cache(policy)
        blocks = find_blocks(policy.model)
        keys = [block.key for block in blocks]
        K = policy.num_inference_steps
        if schedule is None:
            if mode == "original":
                schedule = CacheSchedule.every_step(keys, K)
            elif mode == "threshold":
                schedule = CacheSchedule.periodic(keys, K, request.interval(K))
            elif mode == "edit":
                schedule = CacheSchedule.unified(keys, K, edit_steps or ())
            else:
                schedule = read_optimal_schedule(blocks, K, optimal_steps_dir or "", num_caches, metric, num_bu_blocks)
                schedule = schedule.with_last_step() if refresh_last_step else schedule
        messages = _check_fit(schedule, keys, K)
        applied = _AppliedCache(mode, schedule, blocks, choose_engine(engine, policy, blocks, schedule), messages)
        _replace_cache(policy, applied)
        for message in messages:
            warnings.warn(message, stacklevel=2)
        return policy

    @staticmethod
    def remove_cache(policy: Any) -> Any:
        """Restores `policy` exactly, in place; returns it. A policy without a cache stays as it is.

        Raises:
            RuntimeError: if a method that the cache patched was replaced since; nothing is changed then.
        """
        _replace_cache(policy, None)
        return policy

    @staticmethod
    def refresh(policy: Any) -> Any:
        """Has a cached policy read its weights anew at the next call; returns it.

        Needed after writes that PyTorch cannot see, through ``tensor.data`` or NumPy, to parts of a weight: a fused
        engine finds those by itself, but only within 64 calls.
        """
        applied = _applied_cache(policy)
        if applied is not None:
            applied.engine.refresh()
        return policy

    @staticmethod
    def summary(policy: Any) -> CacheSummary:
        """Mode, engine, K, updates and reuses of each block, the share of FLOPs that is left, warnings given.

        Raises:
            TypeError: if `policy` is no policy.
            ValueError: if its model has no layer of a registered class.
        """
        _check_policy(policy)
        applied = _applied_cache(policy)
        if applied is None:
            blocks, K, schedule = find_blocks(policy.model), policy.num_inference_steps, None
        else:
            blocks, K, schedule = applied.blocks, applied.schedule.num_inference_steps, applied.schedule
        status = applied.engine.status if applied else None
        updates = {block.key: schedule.num_updates(block.key) if schedule else K for block in blocks}
        return CacheSummary(
            mode=applied.mode if applied else "original",
            engine=status.name if status else None,
            engine_reason=status.reason if status else "",
            buffer_bytes=status.buffer_bytes if status else 0,
            constant_bytes=status.constant_bytes if status else 0,
            num_inference_steps=K,
            blocks={key: BlockCounts(n, K - n) for key, n in updates.items()},
            flops_fraction=_flops_fraction(policy.model, blocks, updates, K),
            warnings=applied.warnings if applied else (),
            schedule=schedule,
        )


def _check_policy(policy: Any) -> None:
    missing = [name for name in ("model", "num_inference_steps", "predict_action") if not hasattr(policy, name)]
    if missing:
        raise TypeError(
            f"{type(policy).__name__} is not a diffusion policy that can be cached: it has no {', '.join(missing)}"
        )
    if not isinstance(policy.model, nn.Module):
        raise TypeError(f"policy.model must be a torch.nn.Module, got {type(policy.model).__name__}")


def _check_fit(schedule: CacheSchedule, keys: Sequence[str], num_inference_steps: int) -> tuple[str, ...]:
    """Raises ValueError if the schedule is another policy's; returns what to warn of."""
    if schedule.num_inference_steps != num_inference_steps:
        raise ValueError(
            f"the schedule was made for K = {schedule.num_inference_steps} denoising steps, the policy has "
            f"num_inference_steps = {num_inference_steps}"
        )
    unknown = [key for key in schedule.update_steps if key not in keys]
    if unknown:
        raise ValueError(f"the schedule has blocks that the policy lacks: {unknown}; the policy has {list(keys)}")
    missing = [key for key in keys if key not in schedule.update_steps]
    if missing:
        return (f"no update steps for {', '.join(missing)}: computed at every step",)
    return ()


def _applied_cache(policy: Any) -> _AppliedCache | None:
    return vars(policy).get(CACHE_ATTRIBUTE)


def _replace_cache(policy: Any, new: _AppliedCache | None) -> None:
    old = _applied_cache(policy)
    if old is not None:
        old.uninstall(policy)
    if new is not None:
        new.install(policy)


def _flops_fraction(model: nn.Module, blocks: Sequence[Block], updates: dict[str, int], K: int) -> float:
    """Multiplications with weights that are left, as a share of the plain model's."""
    total = num_weights(model)
    saved = sum((K - updates[block.key]) * block.num_weights for block in blocks)
    return 1 - saved / (K * total)
