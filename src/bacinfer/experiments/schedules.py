"""Where the schedules that are found from a policy come from: assets, a task's observations, or given observations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from bacinfer.analysis.block_selection import write_selections
from bacinfer.analysis.find_plan import (
    MAX_ROUNDS,
    find_plan,
    find_schedules,
    find_sensitive_schedule,
    observe_statistics,
    unified_schedule,
)
from bacinfer.analysis.pipeline import Sampling, collect_statistics, write_schedules
from bacinfer.analysis.recorded import read_matrices
from bacinfer.analysis.residuals import DEFAULT_SEED
from bacinfer.analysis.sensitivity import NUM_PROBES
from bacinfer.assets import RunAssets, read_schedule
from bacinfer.core.blocks import find_blocks
from bacinfer.core.optimal_steps import read_optimal_schedule, stored_selection
from bacinfer.core.schedule import CacheSchedule
from bacinfer.experiments.method import Method
from bacinfer.files import describe, read_json, write_json
from bacinfer.tasks import Task

ANALYSIS_DEMOS = range(8)
"""The training starts at which a policy is analysed."""

ScheduleSource = Callable[[Any, Method], CacheSchedule]
"""From a plain policy that takes the steps of a method's sampler, and the method, to the schedule."""


def analysis_observations(policy: Any, task: Task) -> list[dict[str, Any]]:
    """The first observations of a few training episodes, where schedules are found."""
    return [obs for demo_idx in ANALYSIS_DEMOS for obs in task.observations(policy, demo_idx)]


def found_at(observations: Sequence[Any]) -> ScheduleSource:
    """Schedules that are found at these observations; see `analysis.find_plan`."""

    def find(policy: Any, method: Method) -> CacheSchedule:
        M, metric = method.num_caches or 1, method.metric or ""
        if method.cache == "unified":
            matrices = observe_statistics(policy, observations, metric).matrices(metric)
            return unified_schedule(find_blocks(policy.model), matrices, M, metric)
        if method.budget is not None:
            return find_sensitive_schedule(policy, observations, method.budget)
        plan = find_plan(policy, observations, M, method.num_bu_blocks or 0, metric)
        assert plan.cache is not None
        return plan.cache

    return find


@dataclass(frozen=True)
class ScheduleAssets:
    """The assets that hold the schedules of a checkpoint's methods, or will.

    Attributes:
        checkpoint_sha256: which policy they are of.
        found_dir: where the policy is analysed, into ``original`` with its own K steps and ``ddim_<N>``, for instance,
            with a sampler's.
        given: assets to use instead where they have what a method needs, ``assets/<task>/original``.
        steps_dir: update steps to use, whatever else there is: what they lack is an error, nothing is analysed.
    """

    checkpoint_sha256: str
    found_dir: Path
    given: RunAssets | None = None
    steps_dir: Path | None = None

    def schedules(self, task: Task) -> ScheduleSource:
        """The schedules that are there; others are found first, at the task's observations.

        They raise FileNotFoundError where `steps_dir` lacks the schedule.
        """
        return partial(_stored, self, task)

    def of(self, method: Method) -> RunAssets | None:
        """The assets that hold a method's similarities; None for a method that needs none."""
        if method.metric is None:
            return None
        if self.steps_dir is not None:
            return RunAssets.of_steps_dir(self.steps_dir)
        if self.given is not None and method.sampler is None and _content(self.given, method):
            return self.given
        return self.found(method)

    def found(self, method: Method) -> RunAssets:
        """The assets that the policy is analysed into, with a method's sampler."""
        return RunAssets(
            self.found_dir / ("original" if method.sampler is None else method.sampler.spec.replace(":", "_"))
        )

    def digest(self, method: Method) -> str:
        """What determines a method's schedule, apart from the method and the checkpoint."""
        if method.budget is not None:
            return f"demos {list(ANALYSIS_DEMOS)}, seed {DEFAULT_SEED}, {NUM_PROBES} probes, {MAX_ROUNDS} rounds"
        run = self.of(method)
        if run is None:
            return ""
        if self.is_found(run):
            return f"demos {list(ANALYSIS_DEMOS)}, seed {DEFAULT_SEED}"
        return hashlib.sha256(_content(run, method, self.steps_dir)).hexdigest()

    def is_found(self, run: RunAssets) -> bool:
        return run.directory.parent == self.found_dir


def _stored(assets: ScheduleAssets, task: Task, policy: Any, method: Method) -> CacheSchedule:
    blocks, K = find_blocks(policy.model), policy.num_inference_steps
    if method.budget is not None:
        return _sensitive(assets, task, policy, method)

    run, M, metric = assets.of(method), method.num_caches or 1, method.metric or ""
    assert run is not None  # as there is a metric
    if assets.is_found(run):
        _analyse(policy, task, run, method, assets.checkpoint_sha256)
    if method.cache == "unified":
        matrices = read_matrices(run, metric)
        num_steps = len(next(iter(matrices.values())))
        if num_steps != K:
            raise ValueError(f"{run.directory} is of a policy with K = {num_steps}, this one has K = {K}")
        return unified_schedule(blocks, matrices, M, metric)
    steps_dir = assets.steps_dir or run.steps_dir(metric)
    schedule = read_optimal_schedule(blocks, K, steps_dir, M, metric, method.num_bu_blocks or 0)
    return schedule.with_last_step()


def _sensitive(assets: ScheduleAssets, task: Task, policy: Any, method: Method) -> CacheSchedule:
    """A schedule by sensitivity, from a file or, where that has it not, into it; other processes wait meanwhile."""
    assert method.budget is not None
    path, digest = assets.found(method).sensitive_schedule(method.budget), assets.digest(method)
    keys = {block.key for block in find_blocks(policy.model)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.is_file():
            stored = read_json(path)
            try:
                schedule = CacheSchedule.from_data(stored["schedule"])
                is_of_this = stored["digest"] == digest and schedule.update_steps.keys() == keys
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}: expected a schedule and its digest, found {describe(stored)}") from error
            if is_of_this:
                return schedule
        schedule = find_sensitive_schedule(policy, analysis_observations(policy, task), method.budget)
        write_json(path, {"digest": digest, "schedule": schedule.to_data()})
        return schedule


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
        return bool(_content(run, method))
    schedule = read_schedule(run.steps_dir(method.metric or ""), method.num_caches or 1, method.metric or "")
    has_errors = not method.num_bu_blocks or run.block_errors.is_file()
    return has_errors and schedule is not None and set(blocks) <= schedule.update_steps.keys()


def _content(run: RunAssets, method: Method, steps_dir: Path | None = None) -> bytes:
    """What of `run` determines a method's schedule, apart from the method; empty if some of it is missing.

    Raises:
        ValueError: a file with update steps or selected blocks is damaged.
    """
    metric = method.metric or ""
    if method.cache == "unified":
        try:
            matrices = read_matrices(run, metric)
        except (FileNotFoundError, ValueError):
            return b""
        return b"".join(block.encode() + matrix.tobytes() for block, matrix in matrices.items())
    schedule = read_schedule(steps_dir or run.steps_dir(metric), method.num_caches or 1, metric)
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
