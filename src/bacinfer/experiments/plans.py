"""Method -> plan: its schedule is read from an assets directory, or found from the policy where that has none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from filelock import FileLock

from bacinfer.analysis.block_selection import write_selections
from bacinfer.analysis.pipeline import Sampling, collect_statistics, find_schedules, write_schedules
from bacinfer.analysis.recorded import read_matrices
from bacinfer.analysis.residuals import DEFAULT_SEED
from bacinfer.analysis.similarity import find_metric
from bacinfer.analysis.update_steps import optimal_update_steps
from bacinfer.assets import RunAssets, read_schedule
from bacinfer.core.apply import apply, left_as_found
from bacinfer.core.blocks import find_blocks
from bacinfer.core.optimal_steps import read_optimal_schedule, stored_selection
from bacinfer.core.plan import Fingerprint, SamplingPlan
from bacinfer.core.schedule import CacheSchedule, even_interval
from bacinfer.experiments.method import Method
from bacinfer.tasks import Task

ANALYSIS_DEMOS = range(8)
"""The training starts at which a policy is analysed."""


@dataclass(frozen=True)
class ScheduleSource:
    """Where the schedules of a checkpoint's methods come from.

    Attributes:
        checkpoint_sha256: which policy they are of.
        found_dir: where the policy is analysed, into ``original`` with its own sampler and ``ddim_<N>`` with DDIM's.
        given: assets to use instead where they have what a method needs, ``assets/<task>/original``.
        steps_dir: update steps to use, whatever else there is: what they lack is an error, nothing is analysed.
    """

    checkpoint_sha256: str
    found_dir: Path
    given: RunAssets | None = None
    steps_dir: Path | None = None

    def assets(self, method: Method) -> RunAssets | None:
        """The assets that a method's schedule is read from; None for a method that needs none."""
        if method.metric is None:
            return None
        if self.steps_dir is not None:
            return RunAssets.of_steps_dir(self.steps_dir)
        if self.given is not None and method.ddim_steps is None and stored(self.given, method):
            return self.given
        return RunAssets(self.found_dir / ("original" if method.ddim_steps is None else f"ddim_{method.ddim_steps}"))

    def digest(self, method: Method) -> str:
        """What determines a method's schedule, apart from the method and the checkpoint."""
        run = self.assets(method)
        if run is None:
            return ""
        if self.is_found(run):
            return f"demos {list(ANALYSIS_DEMOS)}, seed {DEFAULT_SEED}"
        return hashlib.sha256(stored(run, method, self.steps_dir)).hexdigest()

    def is_found(self, run: RunAssets) -> bool:
        return run.directory.parent == self.found_dir


def make_plan(policy: Any, task: Task, method: Method, source: ScheduleSource) -> SamplingPlan | None:
    """The plan of a method for a plain policy, which is analysed first if need be; None where it runs as it is.

    Raises:
        ValueError: numbers that do not fit the policy's K or its blocks.
        FileNotFoundError: `source.steps_dir` lacks the schedule.
    """
    with ddim_sampler(policy, method.ddim_steps):
        if method.cache == "plain":
            return None
        return SamplingPlan(_make_schedule(policy, task, method, source), Fingerprint.of(policy))


@contextmanager
def applied(policy: Any, method: Method, plan: SamplingPlan | None, engine: str) -> Iterator[None]:
    """Inside, a policy samples by the plan that `make_plan` made of a method, and by no other."""
    with ddim_sampler(policy, method.ddim_steps), left_as_found(policy):
        if plan is not None:
            apply(policy, plan, engine=engine)
        yield


@contextmanager
def ddim_sampler(policy: Any, num_steps: int | None) -> Iterator[None]:
    """Inside, the policy takes `num_steps` deterministic DDIM steps (eta = 0); its own sampler if that is None.

    Raises:
        ValueError: the policy has no diffusers scheduler, or was trained with fewer steps.
    """
    if num_steps is None:
        yield
        return
    before: Any = getattr(policy, "noise_scheduler", None)
    if not hasattr(before, "config"):
        raise ValueError(f"DDIM needs a policy with a diffusers scheduler as .noise_scheduler, found {before!r}")
    if num_steps > before.config.num_train_timesteps:
        raise ValueError(f"{num_steps} DDIM steps, but the policy was trained with {before.config.num_train_timesteps}")
    num_steps_before = policy.num_inference_steps
    policy.noise_scheduler, policy.num_inference_steps = DDIMScheduler.from_config(before.config), num_steps
    try:
        yield
    finally:
        policy.noise_scheduler, policy.num_inference_steps = before, num_steps_before


def _make_schedule(policy: Any, task: Task, method: Method, source: ScheduleSource) -> CacheSchedule:
    blocks, K = find_blocks(policy.model), policy.num_inference_steps
    keys = [block.key for block in blocks]
    M = method.num_caches or 1
    if M > K:
        raise ValueError(f"{method.spec}: num_caches must be in 1..{K} (K, the number of denoising steps), got {M}")
    if method.cache == "lossless":
        return CacheSchedule.every_step(keys, K)
    if method.cache == "uniform":
        return CacheSchedule.periodic(keys, K, even_interval(K, M))
    if method.cache == "threshold":
        return CacheSchedule.periodic(keys, K, method.interval or 0)
    if method.cache == "edit":
        return CacheSchedule.unified(keys, K, method.steps or ())

    run, metric = source.assets(method), method.metric or ""
    assert run is not None  # as there is a metric
    if source.is_found(run):
        _analyse(policy, task, run, method, source.checkpoint_sha256)
    if method.cache == "unified":
        similarity = np.mean(list(read_matrices(run, metric).values()), axis=0)
        if len(similarity) != K:
            raise ValueError(f"{run.directory} is of a policy with K = {len(similarity)}, this one has K = {K}")
        steps = optimal_update_steps(similarity, [M], maximise=find_metric(metric).maximise)[M]
        schedule = CacheSchedule.unified(keys, K, steps, f"unified {metric}, M = {M}")
    else:
        steps_dir = source.steps_dir or run.steps_dir(metric)
        schedule = read_optimal_schedule(blocks, K, steps_dir, M, metric, method.num_bu_blocks or 0)
    return schedule.with_last_step()


def _analyse(policy: Any, task: Task, run: RunAssets, method: Method, checkpoint_sha256: str) -> None:
    """Puts what a method's schedule is made from into `run`, unless it is there; other processes wait meanwhile."""
    metric, M = method.metric or "", method.num_caches or 1
    run.directory.mkdir(parents=True, exist_ok=True)
    with FileLock(run.directory / ".lock"):
        if _is_whole(run, method, [block.key for block in find_blocks(policy.model)]):
            return
        sampling = Sampling(checkpoint_sha256, policy.num_inference_steps, 1, DEFAULT_SEED)
        statistics = collect_statistics(policy, task, run, ANALYSIS_DEMOS, [metric], sampling)
        write_selections(run, statistics.block_errors())
        write_schedules(run, find_schedules(statistics, [metric], [M]))


def _is_whole(run: RunAssets, method: Method, blocks: Collection[str]) -> bool:
    """Whether an analysis of `blocks` came to its end in `run`."""
    if method.cache == "unified":
        return bool(stored(run, method))
    schedule = read_schedule(run.steps_dir(method.metric or ""), method.num_caches or 1, method.metric or "")
    has_errors = not method.num_bu_blocks or run.block_errors.is_file()
    return has_errors and schedule is not None and set(blocks) <= schedule.update_steps.keys()


def stored(run: RunAssets, method: Method, steps_dir: Path | None = None) -> bytes:
    """What of `run` determines a method's schedule, apart from the method; empty if some of it is missing.

    Raises:
        ValueError: a file with update steps or selected blocks is damaged.
    """
    if method.metric is None:
        return b""
    if method.cache == "unified":
        try:
            matrices = read_matrices(run, method.metric)
        except (FileNotFoundError, ValueError):
            return b""
        return b"".join(block.encode() + matrix.tobytes() for block, matrix in matrices.items())
    schedule = read_schedule(steps_dir or run.steps_dir(method.metric), method.num_caches or 1, method.metric)
    if schedule is None:
        return b""
    steps = json.dumps([schedule.num_inference_steps, {b: list(s) for b, s in schedule.update_steps.items()}]).encode()
    if not method.num_bu_blocks:
        return steps
    selected = stored_selection(run, method.num_bu_blocks)
    if selected is not None:
        return steps + json.dumps(selected).encode()
    residuals = (run.activations, run.activations.with_suffix(".pkl"))
    return next((steps + path.read_bytes() for path in residuals if path.is_file()), b"")
