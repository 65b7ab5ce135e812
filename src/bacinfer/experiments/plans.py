"""Method -> plan: its schedule is read from an assets directory, or found from the policy where that has none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from bacinfer.analysis.block_selection import write_selections
from bacinfer.analysis.find_plan import find_sensitive_schedule
from bacinfer.analysis.pipeline import Sampling, collect_statistics, find_schedules, write_schedules
from bacinfer.analysis.recorded import read_matrices
from bacinfer.analysis.residuals import DEFAULT_SEED
from bacinfer.analysis.sensitivity import NUM_PROBES, holding_costs
from bacinfer.analysis.similarity import Array, find_metric
from bacinfer.analysis.update_budget import check_budget
from bacinfer.analysis.update_steps import optimal_update_steps
from bacinfer.assets import RunAssets, read_by_block, read_schedule, write_by_block
from bacinfer.core.apply import apply, left_as_found
from bacinfer.core.blocks import find_blocks
from bacinfer.core.engines import sampled_by
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
        found_dir: where the policy is analysed, into ``original`` with its own K steps and ``ddim_<N>``, for instance,
            with a sampler's.
        given: assets to use instead where they have what a method needs, ``assets/<task>/original``.
        steps_dir: update steps to use, whatever else there is: what they lack is an error, nothing is analysed.
    """

    checkpoint_sha256: str
    found_dir: Path
    given: RunAssets | None = None
    steps_dir: Path | None = None

    def assets(self, method: Method) -> RunAssets | None:
        """The assets that hold a method's similarities; None for a method that needs none."""
        if method.metric is None:
            return None
        if self.steps_dir is not None:
            return RunAssets.of_steps_dir(self.steps_dir)
        if self.given is not None and method.sampler is None and stored(self.given, method):
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
            return f"demos {list(ANALYSIS_DEMOS)}, seed {DEFAULT_SEED}, {NUM_PROBES} probes"
        run = self.assets(method)
        if run is None:
            return ""
        if self.is_found(run):
            return f"demos {list(ANALYSIS_DEMOS)}, seed {DEFAULT_SEED}"
        return hashlib.sha256(stored(run, method, self.steps_dir)).hexdigest()

    def is_found(self, run: RunAssets) -> bool:
        return run.directory.parent == self.found_dir


def make_plan(policy: Any, task: Task, method: Method, source: ScheduleSource) -> SamplingPlan:
    """The plan of a method for a plain policy, which is analysed first if need be.

    Raises:
        ValueError: numbers that do not fit the policy's K or its blocks, or the sampler cannot run it.
        FileNotFoundError: `source.steps_dir` lacks the schedule.
    """
    made_for = Fingerprint.of(policy)
    warm_start = method.warm_start
    with sampled_by(policy, method.sampler) as sampling:
        cache = None if method.cache == "plain" else _make_schedule(sampling, task, method, source)
        if cache is not None and warm_start is not None:
            warm_start = replace(warm_start, cache=spaced_schedule(policy, method, warm_start.sampler.num_steps))
    return SamplingPlan(cache, method.sampler, warm_start, made_for)


@contextmanager
def applied(policy: Any, method: Method, plan: SamplingPlan, engine: str, precision: str | None) -> Iterator[Any]:
    """Inside, a policy samples by the plan that `make_plan` made of a method, and by no other; see `sampled_by`."""
    with left_as_found(policy), sampled_by(policy, method.sampler if method.as_it_is else None) as sampling:
        if not method.as_it_is:
            apply(policy, plan, engine=engine, precision=precision, stateful=True)
        yield sampling


def _make_schedule(policy: Any, task: Task, method: Method, source: ScheduleSource) -> CacheSchedule:
    blocks, K = find_blocks(policy.model), policy.num_inference_steps
    keys, M = [block.key for block in blocks], method.num_caches or 1
    if M > K:
        raise ValueError(f"{method.spec}: num_caches must be in 1..{K} (K, the number of denoising steps), got {M}")
    if method.cache in ("lossless", "uniform", "threshold"):
        return spaced_schedule(policy, method, K)
    if method.cache == "edit":
        return CacheSchedule.unified(keys, K, method.steps or ())
    if method.budget is not None:
        check_budget(method.budget, K)
        costs = _holding_costs(policy, task, source.found(method).holding_costs, keys, source.digest(method))
        return find_sensitive_schedule(costs, blocks, method.budget)

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


def spaced_schedule(policy: Any, method: Method, num_steps: int) -> CacheSchedule:
    """The schedule of a lossless, uniform or threshold method."""
    keys = [block.key for block in find_blocks(policy.model)]
    if method.cache == "lossless":
        return CacheSchedule.every_step(keys, num_steps)
    interval = method.interval or even_interval(num_steps, min(method.num_caches or 1, num_steps))
    return CacheSchedule.periodic(keys, num_steps, interval)


def _holding_costs(policy: Any, task: Task, path: Path, keys: list[str], digest: str) -> dict[str, Array]:
    """What holding residuals costs, from a file or, where that has it not, into it; other processes wait meanwhile.

    Args:
        keys: The policy's blocks.
        digest: What else determines the costs.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.is_file():
            costs, metadata = read_by_block(path)
            if metadata["blocks"] == keys and metadata.get("digest") == digest:
                return costs
        observations = (obs for demo_idx in ANALYSIS_DEMOS for obs in task.observations(policy, demo_idx))
        costs = holding_costs(policy, tqdm(observations, desc="differentiating the policy", unit="observation"))
        write_by_block(path, costs, keys, digest=digest)
        return costs


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
