"""Checkpoint -> update steps: the whole pipeline from a policy to an assets directory, in one command.

    policy -> residuals -> similarity matrices, block errors -> update steps, selected blocks -> files and pictures

It can be interrupted: the statistics on disk know which demos they are of, and the next run goes on with the others.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bacinfer import assets, bacinfer_files
from bacinfer.analysis.block_selection import write_selections
from bacinfer.analysis.block_statistics import BlockStatistics
from bacinfer.analysis.find_plan import Schedules, find_schedules
from bacinfer.analysis.plots import plot_schedules, plot_similarities
from bacinfer.analysis.residuals import (
    call_seed,
    recording_source,
    recordings,
    write_recording,
)
from bacinfer.analysis.similarity import find_metric
from bacinfer.core.blocks import find_blocks
from bacinfer.core.schedule import check_num_updates
from bacinfer.tasks import Task

DEFAULT_BUDGETS = (5, 8, 10, 20)


@dataclass(frozen=True)
class Sampling:
    """Which residuals the statistics are of, apart from the demos: with another one they are made anew.

    Attributes:
        checkpoint_sha256: Digest of the checkpoint file.
        num_inference_steps: K.
        observations_per_demo: How many policy calls of each episode are recorded.
        noise_seed: Seed of the sampling noise.
    """

    checkpoint_sha256: str
    num_inference_steps: int
    observations_per_demo: int
    noise_seed: int


def collect_statistics(
    policy: Any,
    task: Task,
    run: assets.RunAssets,
    demos: Sequence[int],
    metrics: Sequence[str],
    sampling: Sampling,
    *,
    force: bool = False,
) -> BlockStatistics:
    """Records the policy at each demo and averages similarity matrices and block errors, keeping what is on disk.

    Writes ``similarity_matrices.npz`` after every demo, and the residuals of the first recording to
    ``activations.npz``.

    Args:
        policy: A plain policy.
        task: Where observations come from.
        run: ``assets/<task>/original``.
        demos: Episode starts (see `Task.observations`).
        metrics: Names of the metrics to compare residuals with.
        sampling: What else determines the residuals.
        force: Ignore what is on disk.

    Raises:
        ValueError: if a metric is unknown, a demo is negative, or a residual is not finite.
    """
    for metric in metrics:
        find_metric(metric)
    for demo_idx in demos:
        call_seed(sampling.noise_seed, demo_idx)
    statistics = BlockStatistics(metrics)
    done: list[int] = []
    if not force:
        statistics, done = _resume(run.similarity_matrices, demos, metrics, sampling)
    missing = [demo_idx for demo_idx in demos if demo_idx not in done]
    for demo_idx in tqdm(missing, desc="recording the policy", unit="demo"):
        before = statistics.num_observations
        for recording in recordings(policy, task, demo_idx, sampling.observations_per_demo, sampling.noise_seed):
            if statistics.num_observations == 0:
                source = recording_source(policy, sampling.checkpoint_sha256, demo_idx, sampling.noise_seed)
                write_recording(run, recording, source)
            statistics.add(recording.residuals)
        if (found := statistics.num_observations - before) < sampling.observations_per_demo:
            _say(f"the episode of demo {demo_idx} ended after {found} of {sampling.observations_per_demo} observations")
        done.append(demo_idx)
        statistics.write(run.similarity_matrices, {"demos": done, "sampling": asdict(sampling)})
    return statistics


def _resume(
    path: Path, demos: Sequence[int], metrics: Sequence[str], sampling: Sampling
) -> tuple[BlockStatistics, list[int]]:
    """The statistics on disk and their demos, if the request can go on with them; otherwise empty ones."""
    if not path.is_file():
        return BlockStatistics(metrics), []
    statistics, metadata = BlockStatistics.read(path)
    done = list(metadata.get("demos", ()))
    # Metrics that were asked for earlier stay.
    all_metrics = list(dict.fromkeys([*statistics.metrics, *metrics]))
    changes = [
        f"{name} changed from {_short(metadata.get('sampling', {}).get(name))} to {_short(value)}"
        for name, value in asdict(sampling).items()
        if metadata.get("sampling", {}).get(name) != value
    ]
    if other := [demo_idx for demo_idx in done if demo_idx not in demos]:
        changes.append(f"it is also of demos {other}, which were not asked for")
    if len(all_metrics) > len(statistics.metrics):
        changes.append(f"it has no {', '.join(all_metrics[len(statistics.metrics) :])}")
    if changes:
        _say(f"recomputing {path}: {'; '.join(changes)}")
        return BlockStatistics(all_metrics), []
    _say(f"using {path}, which has demos {done} (--force_recompute records them again)")
    return statistics, done


def write_schedules(run: assets.RunAssets, schedules: Schedules, *, bacinfer_files_too: bool = False) -> None:
    """Writes every block's update steps to where `apply_cache` reads them, and for BACInfer into files of its own."""
    for metric, by_budget in schedules.items():
        steps_dir = run.steps_dir(metric)
        assets.write_schedules(
            steps_dir,
            [
                assets.StoredSchedule(metric, budget, schedule.num_inference_steps, schedule.update_steps)
                for budget, schedule in by_budget.items()
            ],
        )
        if bacinfer_files_too:
            for schedule in by_budget.values():
                for block, steps in schedule.update_steps.items():
                    bacinfer_files.write_steps(steps_dir, block, metric, steps, schedule.num_inference_steps)


def write_pictures(run: assets.RunAssets, statistics: BlockStatistics, schedules: Schedules) -> None:
    """Draws the similarity matrices and the schedules of every metric into ``figures``."""
    figures = run.directory / "figures"
    for metric, by_budget in tqdm(schedules.items(), desc="drawing", unit="metric", leave=False):
        plot_similarities(statistics.matrices(metric), metric, figures / f"similarity_{metric}.png")
        plot_schedules(list(by_budget.values()), figures / f"schedules_{metric}.png")


def analyse_policy(
    policy: Any,
    task: Task,
    run: assets.RunAssets,
    demos: Iterable[int],
    metrics: Iterable[str],
    budgets: Iterable[int],
    sampling: Sampling,
    *,
    force: bool = False,
    bacinfer_files_too: bool = False,
) -> Schedules:
    """The whole pipeline: records `policy`, finds its schedules, and writes all results to `run`.

    Args:
        budgets: Numbers of update steps M.
        bacinfer_files_too: Write update steps and selected blocks as BACInfer reads them, too.
        Others: see `collect_statistics`.

    Raises:
        ValueError: if a budget is not in 1..K, BACInfer's files cannot name a block, or as `collect_statistics`.
    """
    budgets = sorted(set(budgets))
    for budget in budgets:
        check_num_updates(budget, policy.num_inference_steps)
    metrics, demos = list(dict.fromkeys(metrics)), list(dict.fromkeys(demos))
    if bacinfer_files_too:
        for block in find_blocks(policy.model):  # refused before the policy runs, not afterwards
            bacinfer_files.module_name(block.key)
    statistics = collect_statistics(policy, task, run, demos, metrics, sampling, force=force)
    schedules = find_schedules(statistics, metrics, budgets)
    write_schedules(run, schedules, bacinfer_files_too=bacinfer_files_too)
    write_selections(run, statistics.block_errors(), bacinfer_files_too=bacinfer_files_too)
    write_pictures(run, statistics, schedules)
    return schedules


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def _short(value: Any) -> str:
    """A value for a message; of a digest its start."""
    return f"{value[:12]}…" if isinstance(value, str) else str(value)
