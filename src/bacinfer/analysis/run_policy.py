"""Runs a policy once under a cache, beside the plain policy with the same noise: actions, speed, difference."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bacinfer import files
from bacinfer.analysis.residuals import call_seed
from bacinfer.commands.options import (
    add_cache_arguments,
    add_output_argument,
    add_policy_arguments,
    add_start_arguments,
    apply_request,
    cache_request,
    command_line,
    load_policy_and_config,
)
from bacinfer.core.calls import seeded_noise, timed_call
from bacinfer.core.diffusion_cache_wrapper import FastDiffusionPolicy
from bacinfer.core.summary import CacheSummary
from bacinfer.tasks import make_task

REPETITIONS = 3


@dataclass(frozen=True)
class Comparison:
    """A cached policy beside the plain one, at one observation and the same noise; actions in the task's units."""

    cache_mode: str
    engine: str | None  # that ran the schedule; None for the plain policy
    num_inference_steps: int
    updates: dict[str, int]  # block key to how often it is computed
    flops_fraction: float
    plain_seconds: float
    cached_seconds: float
    rms_action_difference: float
    max_action_difference: float
    device: str
    num_threads: int

    def __str__(self) -> str:
        mean_updates = sum(self.updates.values()) / len(self.updates)
        return (
            f"{self.cache_mode}: {mean_updates:.1f} updates a block in {self.num_inference_steps} steps, about "
            f"{self.flops_fraction:.0%} of the FLOPs\n"
            f"{1e3 * self.cached_seconds:.1f} ms an action chunk, plain {1e3 * self.plain_seconds:.1f} ms "
            f"({self.plain_seconds / self.cached_seconds:.2f}x) on {self.device}, {self.num_threads} threads, "
            f"median of {REPETITIONS}\n"
            f"difference to the plain actions: RMS {self.rms_action_difference:.4g}, "
            f"largest {self.max_action_difference:.4g}"
        )


def compare(
    summary: CacheSummary,
    plain: Mapping[str, Tensor],
    plain_seconds: float,
    cached: Mapping[str, Tensor],
    cached_seconds: float,
) -> Comparison:
    """What the cache of a policy did, from its summary and the results and latencies of both runs."""
    difference = (cached["action_pred"] - plain["action_pred"]).double()
    return Comparison(
        cache_mode=summary.mode,
        engine=summary.engine,
        num_inference_steps=summary.num_inference_steps,
        updates={block: counts.updates for block, counts in summary.blocks.items()},
        flops_fraction=summary.flops_fraction,
        plain_seconds=plain_seconds,
        cached_seconds=cached_seconds,
        rms_action_difference=float(difference.square().mean().sqrt()),
        max_action_difference=float(difference.abs().max()),
        device=str(difference.device),
        num_threads=torch.get_num_threads(),
    )


def sample(policy: Any, obs: dict[str, Tensor], seed: int) -> tuple[dict[str, Tensor], float]:
    """The result of `predict_action` with the noise of `seed`, and its median wall time (s) after a warm-up."""
    seconds = []
    for _ in range(1 + REPETITIONS):
        with seeded_noise(policy, seed):
            result, elapsed = timed_call(policy, obs)
        seconds.append(elapsed)
    return result, median(seconds[1:])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bacinfer.analysis.run_policy",
        description="Samples one action chunk with the cache that the flags ask for and with the plain policy, prints "
        "both speeds and the difference, and writes OUT/actions.npz and OUT/summary.json.",
    )
    add_policy_arguments(parser)
    add_output_argument(parser, "directory to write to")
    add_start_arguments(parser)
    add_cache_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    request = cache_request(args)
    policy, checkpoint = load_policy_and_config(args)
    apply_request(policy, request, args.engine)
    task = make_task(checkpoint.cfg, trust_checkpoint=args.trust_checkpoint)
    obs = next(task.observations(policy, args.demo_idx))
    seed = call_seed(args.noise_seed, args.demo_idx)
    cached = sample(policy, obs, seed)
    summary = FastDiffusionPolicy.summary(policy)
    plain = sample(FastDiffusionPolicy.remove_cache(policy), obs, seed)
    comparison = compare(summary, *plain, *cached)

    actions = {name: tensor.cpu().numpy() for name, tensor in cached[0].items()}
    start = {"checkpoint": str(args.checkpoint), "demo_idx": args.demo_idx, "noise_seed": args.noise_seed}
    given = {name: str(value) if isinstance(value, Path) else value for name, value in request.arguments.items()}
    files.write_arrays(args.output_dir / "actions.npz", actions, start)
    files.write_json(args.output_dir / "summary.json", {**start, "cache_arguments": given, **asdict(comparison)})
    print(f"action {list(cached[0]['action'].shape)}:\n{cached[0]['action'].cpu().numpy()}")
    print(f"{comparison}\nwritten to {args.output_dir}: actions.npz, summary.json")
    return 0


main = command_line(run, build_parser)

if __name__ == "__main__":
    sys.exit(main())
