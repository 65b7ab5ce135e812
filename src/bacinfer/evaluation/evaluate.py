"""A policy with and without its cache: scores on the same episodes, latency, FLOPs and action error.

The command behind ``bacinfer eval`` and ``scripts/eval_fast_diffusion_policy.py``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bacinfer.command_options import (
    add_cache_arguments,
    add_policy_arguments,
    apply_cache_arguments,
    load_policy_and_config,
    run_command,
)
from bacinfer.evaluation.comparison import compare
from bacinfer.evaluation.results import format_results, write_results
from bacinfer.evaluation.video import write_side_by_side
from bacinfer.tasks import make_task

DEFAULT_FIRST_SEED = 100_000


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Scores, latency and FLOPs of a policy, plain and with its cache.")
    add_policy_arguments(parser)
    parser.add_argument("-o", "--output_dir", required=True, metavar="OUT", help="where the results are written")
    parser.add_argument("--n_test", type=int, default=50, metavar="N", help="how many episodes to run (default: 50)")
    parser.add_argument(
        "--seed",
        type=int,
        default=DEFAULT_FIRST_SEED,
        help=f"first test seed; the others follow (default: {DEFAULT_FIRST_SEED})",
    )
    parser.add_argument(
        "--latency_calls", type=int, default=20, metavar="N", help="how many calls to time (default: 20)"
    )
    parser.add_argument("--skip_video", action="store_true", help="film no episode")
    add_cache_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    if args.n_test < 1:
        raise ValueError(f"--n_test {args.n_test}: expected at least one episode")
    output_dir = Path(args.output_dir)
    policy, checkpoint = load_policy_and_config(args)
    task = make_task(checkpoint.cfg, trust_checkpoint=args.trust_checkpoint)
    seeds = range(args.seed, args.seed + args.n_test)
    video_dir = None if args.skip_video else output_dir / "media"
    comparison = compare(
        policy,
        task,
        seeds,
        None if args.cache_mode == "original" else lambda policy: apply_cache_arguments(policy, args),
        latency_calls=args.latency_calls,
        video_dir=video_dir,
    )
    if video_dir is not None and args.cache_mode != "original":
        results = {"original": comparison.original, args.cache_mode: comparison.fast}
        write_side_by_side(video_dir / "side_by_side.mp4", results, seeds[0])
    write_results(output_dir, comparison, policy, args, checkpoint.cfg)
    print(format_results(comparison, args.cache_mode))
    print(f"results: {output_dir}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(run, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
