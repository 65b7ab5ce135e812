"""Checkpoints of LeRobot's that hold a plan: ``bacinfer lerobot export``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from bacinfer.commands.options import (
    DEFAULT_NUM_CACHES,
    add_debug_argument,
    command_line,
    path_argument,
)
from bacinfer.core.blocks import find_blocks
from bacinfer.core.optimal_steps import read_optimal_schedule
from bacinfer.core.plan import SamplingPlan
from bacinfer.lerobot.installation import needing_lerobot
from bacinfer.lerobot.registry import handle


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bacinfer lerobot",
        description="export writes a copy of a checkpoint that holds a plan. Where the plugin lerobot_policy_bacinfer "
        "is installed, LeRobot's own commands load it and run it by that plan: lerobot-eval --policy.path=OUT",
    )
    parser.add_argument("command", choices=["export"], help="what to do")
    parser.add_argument("checkpoint", type=path_argument, metavar="CHECKPOINT", help="LeRobot's directory")
    parser.add_argument(
        "plan",
        type=path_argument,
        metavar="PLAN",
        help="a plan's file, or the update steps that `bacinfer steps --lerobot` found, "
        "assets/TASK/original/optimal_steps/METRIC",
    )
    parser.add_argument("out", type=path_argument, metavar="OUT", help="the new directory")
    parser.add_argument(
        "--num_caches",
        type=int,
        metavar="M",
        help=f"of a directory of update steps: those of each block (default: {DEFAULT_NUM_CACHES})",
    )
    parser.add_argument(
        "--num_bu_blocks",
        type=int,
        metavar="N",
        help="of a directory of update steps: blocks that bubbling union extends (default: 0)",
    )
    add_debug_argument(parser)
    return parser


def export_checkpoint(args: argparse.Namespace) -> int:
    checkpoint = needing_lerobot("checkpoint")
    policy = checkpoint.load_policy(args.checkpoint)
    plan = _read_plan(policy, args.plan, args.num_caches, args.num_bu_blocks)
    checkpoint.export(args.checkpoint, policy, plan, args.out)
    print(f"{args.out} runs by {args.plan}; with the plugin lerobot_policy_bacinfer installed:")
    print(f"  lerobot-eval --policy.path={args.out} …")
    return 0


def _read_plan(policy: Any, path: Path, num_caches: int | None, num_bu_blocks: int | None) -> SamplingPlan:
    if not path.is_dir():
        if num_caches is not None or num_bu_blocks is not None:
            raise ValueError(f"--num_caches and --num_bu_blocks are for a directory of update steps, {path} is none")
        return SamplingPlan.load(path)
    found = handle(policy)
    schedule = read_optimal_schedule(
        find_blocks(found.model),
        found.num_inference_steps,
        path,
        DEFAULT_NUM_CACHES if num_caches is None else num_caches,
        path.name,
        num_bu_blocks or 0,
    )
    return SamplingPlan(schedule.with_last_step())


main = command_line(export_checkpoint, build_parser)

if __name__ == "__main__":
    sys.exit(main())
