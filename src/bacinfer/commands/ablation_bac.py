"""What BAC's two parts bring, on many tasks, seeds and checkpoints; what ``shell/main/ablation_bac.sh`` calls."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bacinfer.commands.batch import (
    add_batch_arguments,
    add_schedule_arguments,
    add_task_arguments,
    check_batch_arguments,
    run_batch,
    schedule_settings,
    selected_tasks,
)
from bacinfer.commands.options import run_command
from bacinfer.experiments.method import PLAIN, Method


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ablation_bac.sh",
        description="Evaluates, beside the plain policy, unified ACS (one schedule for all blocks), block-wise ACS "
        "(one for each) and BAC (with bubbling union) on the checkpoints of many tasks. What has a result is kept.",
    )
    add_batch_arguments(parser)
    add_schedule_arguments(parser)
    add_task_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    check_batch_arguments(args)
    M = args.steps
    metric, N = schedule_settings(args)
    if N < 1:
        raise ValueError(f"--num_bu_blocks {N}: without bubbling union BAC is block-wise ACS, expected at least 1")
    methods = {
        "Plain": PLAIN,
        "Unified ACS": Method("unified", num_caches=M, metric=metric),
        "Block-wise ACS": Method("bac", num_caches=M, num_bu_blocks=0, metric=metric),
        "BAC": Method("bac", num_caches=M, num_bu_blocks=N, metric=metric),
    }
    return run_batch(args, selected_tasks(args), methods, f"ablation_{metric}_{M}_bu{N}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(run, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
