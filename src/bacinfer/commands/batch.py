"""Evaluates a cache on many tasks, training seeds and checkpoints; what ``shell/main/run_bac_all.sh`` calls.

A result that is there already is kept, a failure does not stop the others, and the CSV file is complete after each.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from bacinfer.commands.episode_options import add_episode_arguments
from bacinfer.commands.options import (
    DEFAULT_BU_BLOCKS,
    OPTIMAL_DEFAULTS,
    add_debug_argument,
    add_engine_argument,
    integers,
    names,
    path_argument,
    run_command,
)
from bacinfer.core.cache_request import DEFAULT_METRIC, check_effect
from bacinfer.experiments.experiment import Attempts, Experiment
from bacinfer.experiments.method import Method
from bacinfer.experiments.results_table import Row
from bacinfer.experiments.run_files import LOG_FILE, copy_results
from bacinfer.files import atomic_write, read_json, write_text
from bacinfer.policies.device import check_device
from bacinfer.report.table import format_table
from bacinfer.tasks.checkpoints import (
    ASSETS_ROOT,
    CHECKPOINT_TYPES,
    find_checkpoint,
    shipped_checkpoint,
    training_directories,
)
from bacinfer.tasks.table import TASKS, TaskInfo, tasks_in_group, tasks_named

CSV_HEADER = ("Method", "Steps", "Task", "Seed", "CheckpointType", "SuccessRate", "FLOPs", "Speedup")
CSV_FILE = "results.csv"
MARKDOWN_FILE = "results.md"
RESULTS_ROOT = Path("results")

Methods = Mapping[str, Method]
"""What a batch evaluates, by the names that its CSV file has for it."""


@dataclass(frozen=True)
class Job:
    """One evaluation; `checkpoint` is None where none was found, `training_seed` where it is the shipped one."""

    method_name: str
    method: Method
    task: TaskInfo
    seed: int
    checkpoint_type: str
    checkpoint: Path | None
    training_seed: int | None

    @property
    def name(self) -> str:
        return f"{self.method.label}: {self.task.name} seed {self.seed} {self.checkpoint_type}"

    @property
    def origin(self) -> tuple[str, str]:
        """Training seed and type of the checkpoint as result tables have them; a shipped one has no seed."""
        if self.checkpoint is not None and self.training_seed is None:
            return "", "shipped"
        return str(self.seed), self.checkpoint_type

    def directory(self, output_dir: Path, *, several_methods: bool) -> Path:
        folder = output_dir / self.method.spec.replace(":", "_") if several_methods else output_dir
        return folder / self.task.name / f"seed{self.seed}_{self.checkpoint_type}"


@dataclass(frozen=True)
class Outcome:
    """What became of a job: ``evaluated``, ``kept`` (was there already), ``missing`` or ``failed``.

    `scores` are the results of the task's metrics.
    """

    job: Job
    status: str
    row: Row | None = None
    scores: Mapping[str, float] | None = None
    detail: str = ""


def add_batch_arguments(parser: argparse.ArgumentParser) -> None:
    """What all batches have in common, but for the choice of tasks."""
    parser.add_argument("--device", default="cpu", help="where the policies run: cpu, cuda:0, … (default: cpu)")
    parser.add_argument("--steps", type=int, required=True, metavar="M", help="update steps of each block (the budget)")
    parser.add_argument(
        "--seeds", type=integers, default=[0, 1, 2], metavar="0,1,2", help="training seeds (default: 0,1,2)"
    )
    parser.add_argument(
        "--checkpoint_type",
        choices=(*CHECKPOINT_TYPES, "all"),
        default="all",
        help="max: the checkpoint with the best training score; avg: the last one (default: all, both)",
    )
    parser.add_argument(
        "--output_dir",
        type=path_argument,
        metavar="O",
        help="where results go (default: results/ and the cache's settings)",
    )
    add_engine_argument(parser)
    add_episode_arguments(parser)
    add_debug_argument(parser)


def check_batch_arguments(args: argparse.Namespace) -> None:
    """Raises ValueError for numbers or a device that no evaluation can have."""
    for flag in ("steps", "n_test", "latency_calls"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag} {getattr(args, flag)}: expected at least 1")
    check_device(args.device)


def add_schedule_arguments(parser: argparse.ArgumentParser) -> None:
    """--metric and --num_bu_blocks; see `schedule_settings`."""
    parser.add_argument("--metric", help=f"similarity of the schedules (default: {DEFAULT_METRIC})")
    parser.add_argument(
        "--num_bu_blocks",
        type=int,
        metavar="N",
        help=f"blocks that bubbling union extends (default: {DEFAULT_BU_BLOCKS})",
    )


def schedule_settings(args: argparse.Namespace) -> tuple[str, int]:
    """--metric and --num_bu_blocks, or their defaults."""
    return (
        DEFAULT_METRIC if args.metric is None else args.metric,
        DEFAULT_BU_BLOCKS if args.num_bu_blocks is None else args.num_bu_blocks,
    )


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """--task and the flags for groups of tasks; they exclude each other."""
    tasks = parser.add_mutually_exclusive_group()
    tasks.add_argument("--task", type=names, metavar="a,b", help=f"these tasks only, of {', '.join(TASKS)}")
    for flag, (what, _) in _TASK_FLAGS.items():
        tasks.add_argument(f"--{flag}", action="store_true", help=f"{what} only")


_TASK_FLAGS = {
    "ph_only": ("tasks with proficient-human data, and Push-T", tasks_in_group("ph")),
    "mh_only": ("tasks with multi-human data", tasks_in_group("mh")),
    "lowdim_only": ("block pushing and kitchen", tasks_in_group("lowdim")),
    "arm_only": ("tasks of the robot arm", tasks_in_group("arm")),
    "bp_only": ("block pushing", tasks_named(["block_pushing"])),
    "kitchen_only": ("kitchen", tasks_named(["kitchen"])),
}


def selected_tasks(args: argparse.Namespace) -> list[TaskInfo]:
    """The tasks that the flags of `add_task_arguments` name; without ``--task`` those of them that have a checkpoint.

    Raises:
        ValueError: an unknown task.
        FileNotFoundError: no task has a checkpoint.
    """
    if args.task is not None:
        return tasks_named(args.task)
    chosen = [tasks for flag, (_, tasks) in _TASK_FLAGS.items() if getattr(args, flag)]
    return with_checkpoints(chosen[0] if chosen else list(TASKS.values()))


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


def run_batch(args: argparse.Namespace, tasks: Sequence[TaskInfo], methods: Methods, name: str) -> int:
    """Evaluates all methods on all checkpoints of the tasks, and leaves the batch's files.

    ``results.csv`` and ``results.md`` lie in the output directory, and each job's files in
    ``[METHOD/]TASK/seedS_TYPE``. The results themselves are in the results table: that of ``results/``, which all
    batches share, or the output directory's own if one is given.

    Args:
        args: Flags of `add_batch_arguments`.
        name: The output directory in ``results/``.

    Returns:
        The exit status: 1 if something failed or was missing.
    """
    output_dir = args.output_dir or RESULTS_ROOT / name
    results_dir = args.output_dir or RESULTS_ROOT
    jobs = plan(tasks, methods, args)
    attempts = Attempts(results_dir, force=args.force, debug=args.debug)
    outcomes: list[Outcome] = []
    for number, job in enumerate(jobs, start=1):
        print(f"[{number}/{len(jobs)}] {job.name}: {job.checkpoint or 'no checkpoint'}", flush=True)
        directory = job.directory(output_dir, several_methods=len(methods) > 1)
        outcomes.append(_run_job(job, directory, results_dir, attempts, args))
        if outcomes[-1].row is None:
            print(f"{outcomes[-1].status}: {outcomes[-1].detail}", file=sys.stderr)
        write_csv(output_dir / CSV_FILE, outcomes)
        write_text(output_dir / MARKDOWN_FILE, summary_table(outcomes, markdown=True) + "\n")

    print(summary_table(outcomes))
    print(f"results: {output_dir / CSV_FILE}, {output_dir / MARKDOWN_FILE}")
    failures = [outcome for outcome in outcomes if outcome.row is None]
    for outcome in failures:
        print(f"error: {outcome.job.name} {outcome.status}: {outcome.detail}", file=sys.stderr)
    return 1 if failures else 0


def plan(tasks: Sequence[TaskInfo], methods: Methods, args: argparse.Namespace) -> list[Job]:
    """One job per task, training seed, checkpoint type and method; a shipped checkpoint counts once."""
    types = CHECKPOINT_TYPES if args.checkpoint_type == "all" else (args.checkpoint_type,)
    jobs: list[Job] = []
    for task in tasks:
        shipped = shipped_checkpoint(task.name)
        if shipped is not None and not training_directories(task.name):
            print(f"{task.name}: nothing in checkpoint/, evaluating the shipped {shipped} once")
            jobs += [Job(*each, task, args.seeds[0], types[0], shipped, None) for each in methods.items()]
            continue
        for seed, kind in product(args.seeds, types):
            checkpoint = find_checkpoint(task.name, seed, kind)
            jobs += [Job(*each, task, seed, kind, checkpoint, seed) for each in methods.items()]
    return jobs


def _run_job(job: Job, directory: Path, results_dir: Path, attempts: Attempts, args: argparse.Namespace) -> Outcome:
    if job.checkpoint is None:
        expected = f"checkpoint/[low_dim/]{job.task.name}/diffusion_policy_transformer/train_{job.seed}/checkpoints"
        return Outcome(job, "missing", detail=f"no {job.checkpoint_type} checkpoint in {expected}")
    experiment = Experiment(
        checkpoint=str(job.checkpoint),
        method=job.method,
        n_test=args.n_test,
        n_envs=args.n_envs,
        latency_calls=args.latency_calls,
        device=args.device,
        engine=args.engine,
        assets_dir=str(ASSETS_ROOT / job.task.name / "original"),
        training_seed=job.training_seed,
        checkpoint_type=None if job.training_seed is None else job.checkpoint_type,
    )
    found = attempts.run(experiment)
    if found.row is None:
        return Outcome(job, found.status, detail=found.detail)
    run_dir = results_dir / found.row.directory
    try:
        log = read_json(run_dir / LOG_FILE)
        scores = {job.task.row_name(metric): float(log[f"test/{metric}"]) for metric in job.task.metrics}
        copy_results(run_dir, directory)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Outcome(job, "failed", detail=f"the results in {run_dir} are not whole: {error!r}")
    return Outcome(job, found.status, found.row, scores)


def write_csv(path: Path, outcomes: Sequence[Outcome]) -> None:
    """All results so far, one line for each; a task with several metrics has a line for each of them."""
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_HEADER)
        for outcome in outcomes:
            if outcome.row is None:
                continue
            job, row = outcome.job, outcome.row
            steps = row.num_inference_steps if job.method.num_caches is None else job.method.num_caches
            for name, score in (outcome.scores or {}).items():
                what = (job.method_name, steps, name, *job.origin)
                writer.writerow((*what, f"{score:.4f}", row.flops, f"{row.speedup:.3f}"))


def summary_table(outcomes: Sequence[Outcome], *, markdown: bool = False) -> str:
    lines = []
    for outcome in outcomes:
        job, row = outcome.job, outcome.row
        what = [*job.origin, outcome.status, job.method.label]
        if row is None:
            lines.append([job.task.name, *what, "-", "-", "-"])
            continue
        figures = [f"{row.flops / 1e9:.3f}", f"{row.speedup:.2f}x"]
        lines += [[name, *what, f"{score:.3f}", *figures] for name, score in (outcome.scores or {}).items()]
    header = ["task", "seed", "checkpoint", "status", "method", "score", "GFLOPs", "speedup"]
    return format_table(header, lines, markdown=markdown)


# -- the command -------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run_bac_all.sh",
        description="Evaluates BAC on the checkpoints of many tasks. What has a result is kept; schedules that "
        "assets/TASK lacks are found from the policy.",
    )
    add_batch_arguments(parser)
    add_schedule_arguments(parser)
    parser.add_argument(
        "--cache_mode",
        choices=("optimal", "threshold"),
        default="optimal",
        help="optimal: each block at its own steps (BAC); threshold: all blocks at M even steps (default: optimal)",
    )
    add_task_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    check_batch_arguments(args)
    M = args.steps
    if args.cache_mode == "threshold":
        check_effect("threshold", {name: getattr(args, name) for name in OPTIMAL_DEFAULTS}, OPTIMAL_DEFAULTS.items())
        return run_batch(args, selected_tasks(args), {"Uniform": Method("uniform", num_caches=M)}, f"uniform_{M}")
    metric, N = schedule_settings(args)
    bac = Method("bac", num_caches=M, num_bu_blocks=N, metric=metric)
    return run_batch(args, selected_tasks(args), {"BAC": bac}, f"bac_{metric}_{M}_bu{N}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(run, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
