"""The quick start: analyse a policy, cache it, and compare rollouts of the plain and the cached policy.

The command behind ``bash shell/quickstart.sh`` and ``bacinfer demo``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bacinfer.analysis.collect_activations import DEFAULT_DEMO, DEFAULT_SEED, file_digest
from bacinfer.analysis.get_optimal_cache_update_steps import DEFAULT_BUDGETS, Sampling, analyse_policy
from bacinfer.assets import RunAssets, write_text
from bacinfer.command_options import add_policy_arguments, load_policy_and_config, run_command
from bacinfer.core.diffusion_cache_wrapper import FastDiffusionPolicy
from bacinfer.core.summary import CacheSummary
from bacinfer.evaluation.comparison import Result, calibration_observations, evaluate
from bacinfer.evaluation.evaluate import DEFAULT_FIRST_SEED
from bacinfer.evaluation.table import format_table
from bacinfer.evaluation.video import write_side_by_side
from bacinfer.tasks import make_task

SHIPPED_CHECKPOINT = "assets/pusht/pusht_transformer.ckpt"
METRIC = "cosine"
NUM_BU_BLOCKS = 5

Apply = Callable[[Any], Any]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quickstart",
        description="Finds update steps for a policy, applies them, and compares rollouts of the plain and the cached "
        "policy on the same seeds with the same noise: a table, a side-by-side video and pictures of the schedules.",
    )
    add_policy_arguments(parser)
    checkpoint = next(action for action in parser._actions if action.dest == "checkpoint")
    checkpoint.required, checkpoint.default = False, SHIPPED_CHECKPOINT
    parser.add_argument(
        "-o", "--output_dir", type=Path, default=Path("outputs/quickstart"), metavar="OUT", help="default: %(default)s"
    )
    parser.add_argument(
        "--episodes", type=int, default=16, metavar="N", help="episodes of each policy (default: %(default)s)"
    )
    parser.add_argument(
        "--latency_calls", type=int, default=20, metavar="N", help="how many calls to time (default: %(default)s)"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    if args.episodes < 1:
        raise ValueError(f"--episodes {args.episodes}: expected at least one")
    start = time.perf_counter()
    policy, checkpoint = load_policy_and_config(args)
    task = make_task(checkpoint.cfg, trust_checkpoint=args.trust_checkpoint)

    print(f"1. Find the update steps of {args.checkpoint}", flush=True)
    assets = RunAssets(args.output_dir / task.name / "original")
    sampling = Sampling(
        file_digest(args.checkpoint), policy.num_inference_steps, observations_per_demo=1, random_seed=DEFAULT_SEED
    )
    analyse_policy(policy, task, assets, [DEFAULT_DEMO], [METRIC], DEFAULT_BUDGETS, sampling)

    print("2. Roll out the plain and the cached policy", flush=True)
    observations = calibration_observations(policy, task)
    seeds = range(DEFAULT_FIRST_SEED, DEFAULT_FIRST_SEED + args.episodes)
    results: dict[str, Result] = {}
    summaries: dict[str, CacheSummary] = {}
    for name, apply in cache_modes(assets).items():
        apply(policy)
        summaries[name] = FastDiffusionPolicy.summary(policy)
        results[name] = evaluate(
            policy,
            task,
            seeds,
            observations,
            latency_calls=args.latency_calls,
            video_dir=args.output_dir / "media" / name.replace(" ", "_").replace(",", ""),
        )
    FastDiffusionPolicy.remove_cache(policy)

    plain, *_, bac = results
    video = write_side_by_side(args.output_dir / "side_by_side.mp4", {n: results[n] for n in (plain, bac)}, seeds[0])
    write_text(args.output_dir / "schedule.txt", f"{summaries[bac].schedule}\n")
    print(f"\n{summaries[bac]}\n")
    print(comparison_table(results, summaries))
    print(
        f"\n{args.episodes} episodes from seed {seeds[0]}; score: mean of the episodes' highest rewards ± standard "
        f"error; latency of one call\nat batch 1 on {args.device} with {torch.get_num_threads()} threads, median of "
        f"{args.latency_calls}; action error: RMS in units of the action range [-1, 1].\n"
        f"Video: {video}\nSchedules: {assets.directory / 'figures' / f'schedules_{METRIC}.png'}\n"
        f"Took {time.perf_counter() - start:.0f} s."
    )
    return 0


def cache_modes(assets: RunAssets) -> dict[str, Apply]:
    """What the quick start compares, the plain policy first and BAC last."""

    def optimal(num_caches: int) -> Apply:
        return lambda policy: FastDiffusionPolicy.apply_cache(
            policy,
            optimal_steps_dir=assets.steps_dir(METRIC),
            num_caches=num_caches,
            metric=METRIC,
            num_bu_blocks=NUM_BU_BLOCKS,
        )

    return {
        "original": lambda policy: FastDiffusionPolicy.apply_cache(policy, cache_mode="original"),
        "threshold 5": lambda policy: FastDiffusionPolicy.apply_cache(policy, cache_threshold=5),
        f"BAC M=20, BU {NUM_BU_BLOCKS}": optimal(20),
        f"BAC M=10, BU {NUM_BU_BLOCKS}": optimal(10),
    }


def comparison_table(results: dict[str, Result], summaries: dict[str, CacheSummary]) -> str:
    """A row for each mode; the first is what the others are compared with."""
    plain = next(iter(results.values()))
    rows = [
        [
            name,
            f"{summaries[name].mean_updates:.1f}",
            f"{result.cost.flops / 1e9:.2f}",
            f"{result.cost.latency.p50 * 1e3:.0f} / {result.cost.latency.p95 * 1e3:.0f} ms",
            f"{result.cost.frequency:.1f}",
            f"{result.speedup(plain):.1f}x",
            str(result.score),
            f"{result.action_error(plain):.3f}",
        ]
        for name, result in results.items()
    ]
    header = ["mode", "updates/block", "GFLOPs", "latency p50 / p95", "actions/s", "speedup", "score", "action error"]
    return format_table(header, rows)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(run, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
