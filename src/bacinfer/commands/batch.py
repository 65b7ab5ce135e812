"""Methods on many tasks, training seeds and checkpoints; ``bacinfer batch``, and what lies under ``shell/main``.

What has a result is kept, a failure does not stop the others, and the CSV file is complete after each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bacinfer.commands.episode_options import add_episode_arguments
from bacinfer.commands.options import (
    DEFAULT_BU_BLOCKS,
    OPTIMAL_DEFAULTS,
    add_debug_argument,
    add_engine_argument,
    add_precision_argument,
    integers,
    names,
    path_argument,
    run_command,
)
from bacinfer.core.cache_request import DEFAULT_METRIC, check_effect
from bacinfer.experiments.experiment import Attempts
from bacinfer.experiments.jobs import JobResult, make_jobs, run_job, with_checkpoints
from bacinfer.experiments.method import PLAIN, Method
from bacinfer.files import write_text
from bacinfer.report.batch import batch_table, write_csv
from bacinfer.tasks.checkpoints import CHECKPOINT_TYPES
from bacinfer.tasks.table import GROUPS, TASKS, TaskInfo, tasks_in_group, tasks_named

RESULTS_ROOT = Path("results")
CSV_FILE = "results.csv"
MARKDOWN_FILE = "results.md"


BATCHES = {
    "bac": ("run_bac_all.sh", "BAC"),
    "uniform": ("run_uniform_all.sh", "caching with the same update steps for all blocks, every ceil(K / M)-th,"),
    "ablation": (
        "ablation_bac.sh",
        "the plain policy, unified ACS (one schedule for all blocks), block-wise ACS (one for each) and BAC (with "
        "bubbling union)",
    ),
}
"""The scripts under ``shell/main``, and what they evaluate."""

_GROUPS = {
    **{group: tasks_in_group(group) for group in GROUPS},
    "both": [*tasks_in_group("ph"), *tasks_in_group("mh")],
    "all": list(TASKS.values()),
}
_TASK_FLAGS = {
    "ph_only": ("tasks with proficient-human data, and Push-T", _GROUPS["ph"]),
    "mh_only": ("tasks with multi-human data", _GROUPS["mh"]),
    "lowdim_only": ("block pushing and kitchen", _GROUPS["lowdim"]),
    "arm_only": ("tasks of the robot arm", _GROUPS["arm"]),
    "image_only": ("Push-T on pictures", _GROUPS["image"]),
    "bp_only": ("block pushing", tasks_named(["block_pushing"])),
    "kitchen_only": ("kitchen", tasks_named(["kitchen"])),
}


def build_parser(batch: str) -> argparse.ArgumentParser:
    script, what = BATCHES[batch]
    parser = argparse.ArgumentParser(
        prog=script,
        description=f"Evaluates {what} on the checkpoints of many tasks. What has a result is kept; schedules that "
        "assets/TASK lacks are found from the policy.",
    )
    parser.add_argument("--device", default="cpu", help="where the policies run: cpu, cuda:0, … (default: cpu)")
    parser.add_argument("--steps", type=int, required=True, metavar="M", help="update steps of each block (num_caches)")
    parser.add_argument(
        "--training_seeds",
        "--seeds",
        type=integers,
        default=[0, 1, 2],
        metavar="0,1,2",
        help="seeds that the checkpoints were trained with (default: 0,1,2)",
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
    add_precision_argument(parser)
    add_episode_arguments(parser)
    add_debug_argument(parser)
    if batch != "uniform":
        parser.add_argument("--metric", help=f"similarity of the schedules (default: {DEFAULT_METRIC})")
        parser.add_argument(
            "--num_bu_blocks",
            type=int,
            metavar="N",
            help=f"blocks that bubbling union extends (default: {DEFAULT_BU_BLOCKS})",
        )
    if batch == "bac":
        parser.add_argument(
            "--cache_mode",
            choices=("optimal", "threshold"),
            default="optimal",
            help="optimal: each block at its own steps (BAC); threshold: all blocks at M even steps (default: optimal)",
        )
    listed = ", ".join(task.described for task in TASKS.values())
    tasks = parser.add_mutually_exclusive_group()
    tasks.add_argument("--tasks", "--task", type=names, metavar="a,b", help=f"these tasks only, of {listed}")
    if batch == "uniform":
        tasks.add_argument(
            "--task_type",
            choices=_GROUPS,
            help="tasks with proficient-human (ph) or multi-human (mh) data, both of these, low-dimensional ones, or "
            "all (default: all)",
        )
    else:
        for flag, (which, _) in _TASK_FLAGS.items():
            tasks.add_argument(f"--{flag}", action="store_true", help=f"{which} only")
    return parser


def selected_tasks(args: argparse.Namespace) -> list[TaskInfo]:
    """The tasks that the flags name; without ``--tasks`` those of them that have a checkpoint.

    Raises:
        ValueError: an unknown task.
        FileNotFoundError: no task has a checkpoint.
    """
    if args.tasks is not None:
        return tasks_named(args.tasks)
    chosen = [tasks for flag, (_, tasks) in _TASK_FLAGS.items() if getattr(args, flag, False)]
    return with_checkpoints(chosen[0] if chosen else _GROUPS[getattr(args, "task_type", None) or "all"])


def selected_methods(batch: str, args: argparse.Namespace) -> tuple[dict[str, Method], str]:
    """What is evaluated, by the names that the CSV file has for it, and the output directory's name in ``results/``.

    Raises:
        ValueError: numbers that no method can have, or a flag that has no effect.
    """
    M = args.steps
    uniform = Method("uniform", num_caches=M)
    if batch == "uniform":
        return {"Uniform": uniform}, f"uniform_{M}"
    if batch == "bac" and args.cache_mode == "threshold":
        check_effect("threshold", {name: getattr(args, name) for name in OPTIMAL_DEFAULTS}, OPTIMAL_DEFAULTS.items())
        return {"Uniform": uniform}, f"uniform_{M}"
    metric = DEFAULT_METRIC if args.metric is None else args.metric
    N = DEFAULT_BU_BLOCKS if args.num_bu_blocks is None else args.num_bu_blocks
    bac = Method("bac", num_caches=M, num_bu_blocks=N, metric=metric)
    if batch == "bac":
        return {"BAC": bac}, f"bac_{metric}_{M}_bu{N}"
    if N < 1:
        raise ValueError(f"--num_bu_blocks {N}: without bubbling union BAC is block-wise ACS, expected at least 1")
    unified = Method("unified", num_caches=M, metric=metric)
    blockwise = Method("bac", num_caches=M, num_bu_blocks=0, metric=metric)
    methods = {"Plain": PLAIN, "Unified ACS": unified, "Block-wise ACS": blockwise, "BAC": bac}
    return methods, f"ablation_{metric}_{M}_bu{N}"


def run(batch: str, args: argparse.Namespace) -> int:
    """Evaluates, and leaves ``results.csv``, ``results.md`` and each job's files in ``[METHOD/]TASK/seedS_TYPE``.

    The runs themselves are in ``results/``, which all batches share, or in the output directory if one is given.

    Returns:
        The exit status: 1 if something failed or was missing.
    """
    methods, name = selected_methods(batch, args)
    output_dir = args.output_dir or RESULTS_ROOT / name
    types = CHECKPOINT_TYPES if args.checkpoint_type == "all" else (args.checkpoint_type,)
    given = ("n_test", "n_envs", "disturb", "latency_calls", "device", "engine", "precision")
    settings = {name: getattr(args, name) for name in given}
    jobs = make_jobs(selected_tasks(args), methods, args.training_seeds, types, **settings)
    attempts = Attempts(args.output_dir or RESULTS_ROOT, force=args.force, debug=args.debug)
    results: list[JobResult] = []
    for number, job in enumerate(jobs, start=1):
        checkpoint = "no checkpoint" if job.experiment is None else job.experiment.checkpoint
        print(f"[{number}/{len(jobs)}] {job.name}: {checkpoint}", flush=True)
        results.append(run_job(job, attempts, job.directory(output_dir, several_methods=len(methods) > 1)))
        if results[-1].row is None:
            print(f"{results[-1].status}: {results[-1].detail}", file=sys.stderr)
        write_csv(output_dir / CSV_FILE, results)
        write_text(output_dir / MARKDOWN_FILE, batch_table(results, markdown=True) + "\n")

    print(batch_table(results))
    print(f"results: {output_dir / CSV_FILE}, {output_dir / MARKDOWN_FILE}")
    failures = [result for result in results if result.row is None]
    for failure in failures:
        print(f"error: {failure.job.name} {failure.status}: {failure.detail}", file=sys.stderr)
    return 1 if failures else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one of `BATCHES`, which the first argument may name; without it BAC."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    batch = arguments.pop(0) if arguments and arguments[0] in BATCHES else "bac"
    return run_command(partial(run, batch), build_parser(batch), arguments)


if __name__ == "__main__":
    sys.exit(main())
