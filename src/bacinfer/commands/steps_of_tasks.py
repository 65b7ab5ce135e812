"""Runs the analysis for many tasks; what ``shell/get_steps/get_optimal_steps.sh`` calls.

Each task's checkpoint is found by listing, its results go to ``assets/<task>``, and a failure does not stop the others.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bacinfer.analysis import get_optimal_cache_update_steps
from bacinfer.commands.options import add_bacinfer_files_argument, add_debug_argument, command_line
from bacinfer.tasks.checkpoints import ASSETS_ROOT, find_checkpoint, shipped_checkpoint
from bacinfer.tasks.table import GROUPS, TASKS, TaskInfo, tasks_in_group, tasks_named

MISSING = "no checkpoint"
SEED = 0  # the training seed whose checkpoint is analysed


def find_policy(task: str) -> Path | None:
    """The checkpoint that a task's schedules are made from: the best one, the latest one, or the shipped one."""
    return find_checkpoint(task, SEED, "max") or find_checkpoint(task, SEED, "avg") or shipped_checkpoint(task)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="get_optimal_steps.sh",
        description="Finds the update steps of the policies of several tasks and writes them to assets/TASK. Tasks "
        "without a checkpoint are skipped and named at the end.",
    )
    parser.add_argument("--device", default="cpu", help="where the policies run: cpu, cuda:0, … (default: cpu)")
    parser.add_argument("--num_caches", metavar="M,N", help="numbers of update steps (default: 5,8,10,20)")
    parser.add_argument("--metrics", metavar="A,B", help="how to compare residuals (default: cosine,l1,mse)")
    tasks = parser.add_mutually_exclusive_group()
    tasks.add_argument("--task", metavar="A,B", help=f"some of {', '.join(TASKS)} (default: all of them)")
    for group in GROUPS:
        tasks.add_argument(
            f"--{group}_only", dest="group", action="store_const", const=group, help=f"the {group} tasks"
        )
    parser.add_argument("--no_force", action="store_true", help="use what is in assets already and go on from there")
    add_bacinfer_files_argument(parser)
    add_debug_argument(parser)
    return parser


def analyse_tasks(args: argparse.Namespace) -> int:
    outcomes = {task.name: _analyse_task(task.name, args) for task in _chosen_tasks(args)}
    print("\n".join(f"{name:16}{outcome}" for name, outcome in outcomes.items()))
    # A checkpoint that is missing is a failure only where its task was asked for by name.
    accepted = {"done"} if args.task is not None else {"done", MISSING}
    return 0 if "done" in outcomes.values() and set(outcomes.values()) <= accepted else 1


def _analyse_task(task: str, args: argparse.Namespace) -> str:
    checkpoint = find_policy(task)
    if checkpoint is None:
        return MISSING
    command = ["--checkpoint", str(checkpoint), "--output_dir", str(ASSETS_ROOT / task), "--device", args.device]
    command += [] if args.num_caches is None else ["--num_caches", args.num_caches]
    command += [] if args.metrics is None else ["--metrics", args.metrics]
    command += [] if args.no_force else ["--force_recompute"]
    command += ["--bacinfer_files"] if args.bacinfer_files else []
    command += ["--debug"] if args.debug else []
    print(f"{task}: {checkpoint}", file=sys.stderr)
    status = get_optimal_cache_update_steps.main(command)
    return "done" if status == 0 else "failed"


def _chosen_tasks(args: argparse.Namespace) -> list[TaskInfo]:
    if args.group:
        return tasks_in_group(args.group)
    return tasks_named(TASKS if args.task is None else args.task.split(","))


main = command_line(analyse_tasks, build_parser)

if __name__ == "__main__":
    sys.exit(main())
