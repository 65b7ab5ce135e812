"""Checkpoint -> update steps: ``bacinfer steps``, ``python -m bacinfer.analysis.get_optimal_cache_update_steps``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bacinfer import assets
from bacinfer.analysis.pipeline import DEFAULT_BUDGETS, Sampling, analyse_policy
from bacinfer.analysis.residuals import DEFAULT_DEMO, file_digest
from bacinfer.commands.options import (
    add_bacinfer_files_argument,
    add_metrics_argument,
    add_output_argument,
    add_policy_arguments,
    add_seed_argument,
    command_line,
    integers,
    load_policy_and_task,
)
from bacinfer.lerobot.installation import WEIGHTS, needing_lerobot
from bacinfer.tasks import Task


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bacinfer.analysis.get_optimal_cache_update_steps",
        description="Finds out when each residual block of a policy has to be recomputed: runs the policy, compares "
        "the residuals of all denoising steps, and writes the best update steps to OUT/original. Run it again to go "
        "on after an interruption.",
    )
    add_policy_arguments(parser, lerobot="--dataset")
    parser.add_argument(
        "--dataset",
        metavar="DATASET",
        help="with --lerobot: the LeRobot data set whose episodes are observed, a directory or its name on the Hub",
    )
    add_output_argument(parser, "the task's assets, e.g. assets/pusht")
    parser.add_argument(
        "--num_caches",
        type=integers,
        default=list(DEFAULT_BUDGETS),
        metavar="M,N",
        help="numbers of update steps to find schedules for, each in 1..K, the number of denoising steps (default: "
        f"{','.join(map(str, DEFAULT_BUDGETS))})",
    )
    add_metrics_argument(parser)
    demos = parser.add_mutually_exclusive_group()
    demos.add_argument(
        "--demo_idx",
        type=integers,
        default=[DEFAULT_DEMO],
        metavar="I,J",
        help="episodes to average over: below 10000 training starts (demonstrations or seeds), from 10000 on test "
        f"seeds (default: {DEFAULT_DEMO}); with --lerobot episodes of the data set",
    )
    demos.add_argument("--num_demos", type=int, metavar="N", help="the first N training starts instead")
    parser.add_argument(
        "--observations_per_demo",
        type=int,
        default=1,
        metavar="N",
        help="observations of each episode to average over, from its start on (default: 1)",
    )
    add_seed_argument(parser)
    add_bacinfer_files_argument(parser)
    parser.add_argument("--force_recompute", action="store_true", help="do not use what is in OUT already")
    return parser


def analyse_checkpoint(args: argparse.Namespace) -> int:
    policy, task, weights = _diffusion_policy(args) if args.lerobot is None else _lerobot(args)
    run = assets.RunAssets(args.output_dir / "original")
    sampling = Sampling(file_digest(weights), policy.num_inference_steps, args.observations_per_demo, args.noise_seed)
    analyse_policy(
        policy,
        task,
        run,
        _demos(args),
        args.metrics,
        args.num_caches,
        sampling,
        force=args.force_recompute,
        bacinfer_files_too=args.bacinfer_files,
    )
    megabytes = sum(path.stat().st_size for path in run.directory.rglob("*") if path.is_file()) / 1e6
    print(f"update steps for {', '.join(args.metrics)} in {run.directory} ({megabytes:.1f} MB). To use them:")
    steps_dir = run.steps_dir(args.metrics[0])
    if args.lerobot is not None:
        print(f"  bacinfer lerobot export {args.lerobot} {steps_dir} OUT --num_caches {args.num_caches[0]}")
        return 0
    print(
        f"  FastDiffusionPolicy.apply_cache(policy, optimal_steps_dir={str(steps_dir)!r}, "
        f"num_caches={args.num_caches[0]}, metric={args.metrics[0]!r}, num_bu_blocks=1)"
    )
    return 0


def _diffusion_policy(args: argparse.Namespace) -> tuple[Any, Task, Path]:
    """The policy of Diffusion Policy's, its task, and the file that its weights are in."""
    if args.dataset is not None:
        raise ValueError("--dataset is for --lerobot; a Diffusion Policy checkpoint says what its task is")
    return *load_policy_and_task(args), args.checkpoint


def _lerobot(args: argparse.Namespace) -> tuple[Any, Any, Path]:
    """The handle of LeRobot's policy, the episodes of the data set, and the file that its weights are in."""
    if args.dataset is None:
        raise ValueError("--lerobot needs --dataset, the data set that the policy observes")
    checkpoint = needing_lerobot("checkpoint")
    policy = checkpoint.load_policy(args.lerobot, args.device)
    preprocessor = checkpoint.load_preprocessor(args.lerobot, policy)
    episodes = checkpoint.Episodes(args.dataset, preprocessor, policy.config.n_action_steps)
    return checkpoint.handle(policy), episodes, args.lerobot / WEIGHTS


def _demos(args: argparse.Namespace) -> Sequence[int]:
    if args.num_demos is None:
        return args.demo_idx
    if args.num_demos < 1:
        raise ValueError(f"--num_demos must be at least 1, got {args.num_demos}")
    return range(args.num_demos)


main = command_line(analyse_checkpoint, build_parser)

if __name__ == "__main__":
    sys.exit(main())
