"""Uniform caching on many tasks, training seeds and checkpoints; what ``shell/main/run_uniform_all.sh`` calls."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bacinfer.commands.batch import add_batch_arguments, check_batch_arguments, run_batch, with_checkpoints
from bacinfer.commands.options import names, run_command
from bacinfer.experiments.method import Method
from bacinfer.tasks.table import GROUPS, TASKS, tasks_in_group, tasks_named

_GROUPS = {**{group: (group,) for group in GROUPS}, "both": ("ph", "mh"), "all": GROUPS}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run_uniform_all.sh",
        description="Evaluates caching with the same evenly spaced update steps for all blocks, every ceil(K / M)-th, "
        "on the checkpoints of many tasks. What has a result is kept.",
    )
    add_batch_arguments(parser)
    tasks = parser.add_mutually_exclusive_group()
    tasks.add_argument(
        "--task_type",
        choices=_GROUPS,
        default="all",
        help="tasks with proficient-human (ph) or multi-human (mh) data, both of these, low-dimensional ones, or all "
        "(default: %(default)s)",
    )
    tasks.add_argument("--tasks", type=names, metavar="a,b", help=f"these tasks only, of {', '.join(TASKS)}")
    return parser


def run(args: argparse.Namespace) -> int:
    check_batch_arguments(args)
    if args.tasks is not None:
        tasks = tasks_named(args.tasks)
    else:
        tasks = with_checkpoints([task for group in _GROUPS[args.task_type] for task in tasks_in_group(group)])
    return run_batch(args, tasks, {"Uniform": Method("uniform", num_caches=args.steps)}, f"uniform_{args.steps}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(run, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
