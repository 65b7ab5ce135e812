"""FastDiffusionPolicy: the reference's door. It makes a schedule of its arguments, and applies it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bacinfer.core.apply import apply_plan, left_as_found, remove, summary
from bacinfer.core.blocks import find_blocks
from bacinfer.core.cache_request import DEFAULT_METRIC, DEFAULT_THRESHOLD, Default, resolve_request
from bacinfer.core.engines import AUTO, ENGINES, LOSSLESS_ENGINES
from bacinfer.core.handle import PolicyHandle
from bacinfer.core.optimal_steps import read_optimal_schedule
from bacinfer.core.plan import SamplingPlan
from bacinfer.core.schedule import CacheSchedule
from bacinfer.core.summary import CacheSummary

DEFAULT_NUM_CACHES = Default(30)

_DEFAULTS = {
    "cache_threshold": DEFAULT_THRESHOLD,
    "num_caches": DEFAULT_NUM_CACHES,
    "metric": DEFAULT_METRIC,
    "num_bu_blocks": 0,
    "refresh_last_step": True,
}
"""What code may write out in any mode, as the signature says it."""


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
            engine: What executes the schedule, see `bacinfer.apply`. With 'original', 'onednn', 'fused' and
                'cuda_graph' run the plain policy without loss.

        Raises:
            TypeError: if the policy lacks what is said above. (Where it names its parts differently, pass a
                `bacinfer.PolicyHandle`.)
            ValueError: if an argument is unknown, has no effect in the mode (its default may be written out), or does
                not fit the policy's K or blocks.
            FileNotFoundError: if there are no update steps as requested; says what is there.
        """
        PolicyHandle.of(policy)
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
            return remove(policy)
        with left_as_found(policy):
            handle = PolicyHandle.of(policy)
            blocks, K = find_blocks(handle.model), handle.num_inference_steps
        keys = [block.key for block in blocks]
        if mode == "original":
            schedule = CacheSchedule.every_step(keys, K)
        elif mode == "threshold":
            schedule = CacheSchedule.periodic(keys, K, request.interval(K))
        elif mode == "edit":
            schedule = CacheSchedule.unified(keys, K, edit_steps or ())
        elif schedule is None:
            schedule = read_optimal_schedule(blocks, K, optimal_steps_dir or "", num_caches, metric, num_bu_blocks)
            schedule = schedule.with_last_step() if refresh_last_step else schedule
        apply_plan(policy, SamplingPlan(schedule), mode=mode, engine=engine)
        return policy

    @staticmethod
    def remove_cache(policy: Any) -> Any:
        """See `bacinfer.remove`."""
        return remove(policy)

    @staticmethod
    def summary(policy: Any) -> CacheSummary:
        """See `bacinfer.summary`."""
        return summary(policy)
