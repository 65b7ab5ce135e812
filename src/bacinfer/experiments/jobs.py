"""Batches: methods on many tasks, training seeds and checkpoints, each an experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from bacinfer.experiments.experiment import Attempts, Experiment
from bacinfer.experiments.method import Method
from bacinfer.experiments.run_files import LOG_FILE, copy_results
from bacinfer.experiments.store import Row
from bacinfer.files import read_json
from bacinfer.tasks.checkpoints import ASSETS_ROOT, find_checkpoint, shipped_checkpoint, training_directories
from bacinfer.tasks.table import TaskInfo


@dataclass(frozen=True)
class Job:
    """One experiment of a batch, by what was asked for.

    Attributes:
        method_name: what the batch's CSV file calls the method.
        experiment: None where the checkpoint is missing.
    """

    method_name: str
    method: Method
    task: TaskInfo
    training_seed: int
    checkpoint_type: str
    experiment: Experiment | None

    @property
    def name(self) -> str:
        return f"{self.method.label}: {self.task.name} seed {self.training_seed} {self.checkpoint_type}"

    @property
    def origin(self) -> tuple[str, str]:
        """Training seed and type of the checkpoint as result tables have them; a shipped one has no seed."""
        if self.experiment is not None and self.experiment.training_seed is None:
            return "", "shipped"
        return str(self.training_seed), self.checkpoint_type

    def directory(self, output_dir: Path, *, several_methods: bool) -> Path:
        folder = output_dir / self.method.spec.replace(":", "_") if several_methods else output_dir
        return folder / self.task.name / f"seed{self.training_seed}_{self.checkpoint_type}"


@dataclass(frozen=True)
class JobResult:
    """What became of a job: ``evaluated``, ``kept`` (was there already), ``missing`` or ``failed``.

    `scores` are the results of the task's metrics, by the names that result tables have for them.
    """

    job: Job
    status: str
    row: Row | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    detail: str = ""


def with_checkpoints(tasks: Sequence[TaskInfo]) -> list[TaskInfo]:
    """Those tasks that have a checkpoint; names the others.

    Raises:
        FileNotFoundError: there are none.
    """
    found = [task for task in tasks if training_directories(task.name) or shipped_checkpoint(task.name)]
    missing = [task.name for task in tasks if task not in found]
    if missing:
        print(f"left out, as there is no checkpoint: {', '.join(missing)}")
    if not found:
        raise FileNotFoundError(
            "no checkpoint of any of these tasks: expected "
            "checkpoint/[low_dim/]TASK/diffusion_policy_transformer/train_SEED/checkpoints/*.ckpt"
        )
    return found


def make_jobs(
    tasks: Sequence[TaskInfo],
    methods: Mapping[str, Method],
    training_seeds: Sequence[int],
    checkpoint_types: Sequence[str],
    **settings: Any,
) -> list[Job]:
    """One job per task, training seed, checkpoint type and method; a shipped checkpoint counts once.

    Args:
        methods: By the names that the batch's CSV file has for them.
        settings: Of every `Experiment`.

    Raises:
        ValueError: settings that no experiment can have.
    """
    jobs: list[Job] = []
    for task in tasks:
        shipped = shipped_checkpoint(task.name)
        stands_in = shipped is not None and not training_directories(task.name)
        if stands_in:
            print(f"{task.name}: nothing in checkpoint/, evaluating the shipped {shipped} once")
        wanted = list(product(training_seeds, checkpoint_types))
        for seed, kind in wanted[:1] if stands_in else wanted:
            checkpoint = shipped if stands_in else find_checkpoint(task.name, seed, kind)
            of_plain = None
            if checkpoint is not None:
                of_plain = Experiment(
                    checkpoint=str(checkpoint),
                    assets_dir=str(ASSETS_ROOT / task.name / "original"),
                    training_seed=None if stands_in else seed,
                    checkpoint_type=None if stands_in else kind,
                    **settings,
                )
            for name, method in methods.items():
                experiment = None if of_plain is None else replace(of_plain, method=method)
                jobs.append(Job(name, method, task, seed, kind, experiment))
    return jobs


def run_job(job: Job, attempts: Attempts, directory: Path) -> JobResult:
    """Runs a job, and copies the files of its run that BACInfer's users know into `directory`."""
    if job.experiment is None:
        where = f"{job.task.name}/diffusion_policy_transformer/train_{job.training_seed}/checkpoints"
        return JobResult(job, "missing", detail=f"no {job.checkpoint_type} checkpoint in checkpoint/[low_dim/]{where}")
    outcome = attempts.run(job.experiment)
    if outcome.row is None:
        return JobResult(job, outcome.status, detail=outcome.detail)
    run_dir = attempts.results_dir / outcome.row.directory
    try:
        log = read_json(run_dir / LOG_FILE)
        scores = {job.task.row_name(metric): float(log[f"test/{metric}"]) for metric in job.task.metrics}
        copy_results(run_dir, directory)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return JobResult(job, "failed", detail=f"the results in {run_dir} are not whole: {error!r}")
    return JobResult(job, outcome.status, outcome.row, scores)
