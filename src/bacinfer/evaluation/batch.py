"""Evaluates a cache on many tasks, training seeds and checkpoints; what ``shell/main/run_bac_all.sh`` calls.

A result that is there already is kept, a failure does not stop the others, and the CSV file is complete after each.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bacinfer.assets import atomic_write
from bacinfer.command_options import add_debug_argument, check_device, integers, names, run_command
from bacinfer.evaluation import evaluate
from bacinfer.evaluation.results import BENCHMARK_FILE, LOG_FILE, RESULTS_FILE
from bacinfer.evaluation.table import format_table
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
METHODS = {"optimal": "BAC", "threshold": "Uniform"}


@dataclass(frozen=True)
class Job:
    """One evaluation; `checkpoint` is None where none was found."""

    task: TaskInfo
    seed: int
    checkpoint_type: str
    checkpoint: Path | None

    @property
    def name(self) -> str:
        return f"{self.task.name} seed {self.seed} {self.checkpoint_type}"

    def directory(self, output_dir: Path) -> Path:
        return output_dir / self.task.name / f"seed{self.seed}_{self.checkpoint_type}"


@dataclass(frozen=True)
class Outcome:
    """What became of a job: ``evaluated``, ``kept`` (was there already), ``missing`` or ``failed``."""

    job: Job
    status: str
    detail: str = ""

    @property
    def has_result(self) -> bool:
        return self.status in ("evaluated", "kept")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="run_bac_all.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="where the policies run: cpu, cuda:0, … (default: cpu)")
    parser.add_argument("--steps", type=int, required=True, metavar="M", help="update steps of each block (the budget)")
    parser.add_argument("--metric", default="cosine", help="similarity of the schedules (default: cosine)")
    parser.add_argument(
        "--seeds", type=integers, default=[0, 1, 2], metavar="0,1,2", help="training seeds (default: 0,1,2)"
    )
    parser.add_argument(
        "--num_bu_blocks", type=int, default=5, metavar="N", help="blocks that bubbling union extends (default: 5)"
    )
    parser.add_argument(
        "--cache_mode",
        choices=sorted(METHODS),
        default="optimal",
        help="optimal: each block at its own steps (BAC); threshold: all blocks at M even steps (default: optimal)",
    )
    tasks = parser.add_mutually_exclusive_group()
    tasks.add_argument("--task", type=names, metavar="a,b", help=f"these tasks only, of {', '.join(TASKS)}")
    for flag, what in _TASK_FLAGS.items():
        tasks.add_argument(f"--{flag}", action="store_true", help=f"{what} only")
    parser.add_argument(
        "--checkpoint_type",
        choices=(*CHECKPOINT_TYPES, "all"),
        default="all",
        help="max: the checkpoint with the best training score; avg: the last one (default: all, both)",
    )
    parser.add_argument(
        "--output_dir", metavar="O", help="where results go (default: results/ and the cache's settings)"
    )
    parser.add_argument("--n_test", type=int, default=50, metavar="N", help="episodes of each (default: 50)")
    parser.add_argument("--force", action="store_true", help="evaluate again what has a result already")
    add_debug_argument(parser)
    return parser


_TASK_FLAGS = {
    "ph_only": "tasks with proficient-human data, and Push-T",
    "mh_only": "tasks with multi-human data",
    "lowdim_only": "block pushing and kitchen",
    "bp_only": "block pushing",
    "kitchen_only": "kitchen",
}


def run(args: argparse.Namespace) -> int:
    for flag in ("steps", "n_test"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag} {getattr(args, flag)}: expected at least 1")
    check_device(args.device)
    output_dir = Path(args.output_dir or _default_output_dir(args))
    jobs = plan(selected_tasks(args), args)

    outcomes: list[Outcome] = []
    for number, job in enumerate(jobs, start=1):
        print(f"[{number}/{len(jobs)}] {job.name}: {job.checkpoint or 'no checkpoint'}", flush=True)
        outcomes.append(_run_job(job, job.directory(output_dir), args))
        if not outcomes[-1].has_result:
            print(f"{outcomes[-1].status}: {outcomes[-1].detail}", file=sys.stderr)
        write_csv(output_dir / CSV_FILE, outcomes, output_dir, args)

    print(summary_table(outcomes, output_dir))
    print(f"results: {output_dir / CSV_FILE}")
    failures = [outcome for outcome in outcomes if not outcome.has_result]
    for outcome in failures:
        print(f"error: {outcome.job.name} {outcome.status}: {outcome.detail}", file=sys.stderr)
    return 1 if failures else 0


def selected_tasks(args: argparse.Namespace) -> list[TaskInfo]:
    """The tasks that the flags name; without ``--task`` those of them that have a checkpoint.

    Raises:
        ValueError: an unknown task.
        FileNotFoundError: no task has a checkpoint.
    """
    if args.task is not None:
        return tasks_named(args.task)
    if args.ph_only or args.mh_only or args.lowdim_only:
        tasks = tasks_in_group("ph" if args.ph_only else "mh" if args.mh_only else "lowdim")
    elif args.bp_only or args.kitchen_only:
        tasks = tasks_named(["block_pushing" if args.bp_only else "kitchen"])
    else:
        tasks = list(TASKS.values())
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


def plan(tasks: Sequence[TaskInfo], args: argparse.Namespace) -> list[Job]:
    """One job per task, training seed and checkpoint type; one in all for a task that has a shipped checkpoint only."""
    types = CHECKPOINT_TYPES if args.checkpoint_type == "all" else (args.checkpoint_type,)
    jobs = []
    for task in tasks:
        shipped = shipped_checkpoint(task.name)
        if shipped is not None and not training_directories(task.name):
            print(f"{task.name}: nothing in checkpoint/, evaluating the shipped {shipped} once")
            jobs.append(Job(task, args.seeds[0], types[0], shipped))
        else:
            jobs += [
                Job(task, seed, kind, find_checkpoint(task.name, seed, kind)) for seed in args.seeds for kind in types
            ]
    return jobs


def _run_job(job: Job, directory: Path, args: argparse.Namespace) -> Outcome:
    if job.checkpoint is None:
        expected = f"checkpoint/[low_dim/]{job.task.name}/diffusion_policy_transformer/train_{job.seed}/checkpoints"
        return Outcome(job, "missing", f"no {job.checkpoint_type} checkpoint in {expected}")
    argv = _evaluation_arguments(job, job.checkpoint, directory, args)
    try:
        evaluation_args = evaluate.build_parser().parse_args(argv)
        if not args.force and (directory / RESULTS_FILE).is_file():
            _check_same_settings(directory, evaluation_args)
            return Outcome(job, "kept")
        evaluate.run(evaluation_args)
    except Exception as error:  # whatever it is, the other jobs go on
        if args.debug:
            traceback.print_exc()
        return Outcome(job, "failed", str(error) or repr(error))
    return Outcome(job, "evaluated")


def _evaluation_arguments(job: Job, checkpoint: Path, directory: Path, args: argparse.Namespace) -> list[str]:
    steps_dir = ASSETS_ROOT / job.task.name / "original" / "optimal_steps" / args.metric
    options = {
        "checkpoint": checkpoint,
        "output_dir": directory,
        "device": args.device,
        "n_test": args.n_test,
        "cache_mode": args.cache_mode,
        "num_caches": args.steps,
    }
    if args.cache_mode == "optimal":
        options |= {"optimal_steps_dir": steps_dir, "metric": args.metric, "num_bu_blocks": args.num_bu_blocks}
    return [text for name, value in options.items() for text in (f"--{name}", str(value))] + ["--skip_video"]


def _check_same_settings(directory: Path, args: argparse.Namespace) -> None:
    """Raises ValueError if the result in `directory` is of another evaluation."""
    settings = json.loads((directory / BENCHMARK_FILE).read_text())["settings"]
    keys = ["checkpoint", "cache_mode", "num_caches", "n_test"]
    if args.cache_mode == "optimal":
        keys += ["metric", "num_bu_blocks"]
    asked = {name: getattr(args, name) for name in keys}
    differing = [name for name in keys if settings[name] != asked[name]]
    if differing:
        found = ", ".join(f"{name} {settings[name]} instead of {asked[name]}" for name in differing)
        raise ValueError(f"{directory} has a result with {found}: pass --force, or another --output_dir")


def write_csv(path: Path, outcomes: Sequence[Outcome], output_dir: Path, args: argparse.Namespace) -> None:
    """All results so far; a task with several metrics has a row for each."""
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_HEADER)
        for outcome in outcomes:
            job = outcome.job
            for row_name, score, results in _rows(outcome, output_dir):
                method = METHODS[args.cache_mode]
                flops, speedup = results["flops"], f"{results['speedup']:.3f}"
                writer.writerow(
                    (method, args.steps, row_name, job.seed, job.checkpoint_type, f"{score:.4f}", flops, speedup)
                )


def summary_table(outcomes: Sequence[Outcome], output_dir: Path) -> str:
    rows = []
    for outcome in outcomes:
        job = outcome.job
        what = [str(job.seed), job.checkpoint_type, outcome.status]
        rows += [
            [row_name, *what, f"{score:.3f}", f"{results['flops'] / 1e9:.3f}", f"{results['speedup']:.2f}x"]
            for row_name, score, results in _rows(outcome, output_dir)
        ] or [[job.task.name, *what, "-", "-", "-"]]
    return format_table(["task", "seed", "checkpoint", "status", "score", "GFLOPs", "speedup"], rows)


def _rows(outcome: Outcome, output_dir: Path) -> list[tuple[str, float, dict[str, Any]]]:
    """The result rows of a job: name, score, and the evaluation's summary."""
    if not outcome.has_result:
        return []
    directory = outcome.job.directory(output_dir)
    results = json.loads((directory / RESULTS_FILE).read_text())
    log = json.loads((directory / LOG_FILE).read_text())
    task = outcome.job.task
    return [(task.row_name(metric), float(log[f"test/{metric}"]), results) for metric in task.metrics]


def _default_output_dir(args: argparse.Namespace) -> Path:
    if args.cache_mode == "threshold":
        return Path("results") / f"uniform_{args.steps}"
    return Path("results") / f"bac_{args.metric}_{args.steps}_bu{args.num_bu_blocks}"


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(run, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
