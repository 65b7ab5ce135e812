"""How much environments add to a policy's own time when episodes are rolled out, for the plain and the cached policy.

    python benchmarks/rollouts.py [--task pusht] [--episodes 50] [--num_threads 1] [--n_workers N]

The first rollout starts the processes that step the environments; the plain policy's is the second one.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence

import torch

from bacinfer import FastDiffusionPolicy
from bacinfer.commands.options import add_debug_argument, run_command
from bacinfer.policies import build_policy, read_checkpoint
from bacinfer.tasks import make_task
from bacinfer.tasks.checkpoints import ASSETS_ROOT, shipped_checkpoint
from bacinfer.tasks.simulated import SimulatedTask

FIRST_SEED = 100_000


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.num_threads)
    path = shipped_checkpoint(args.task)
    if path is None:
        raise FileNotFoundError(f"no checkpoint of {args.task} in {ASSETS_ROOT}")
    checkpoint = read_checkpoint(path)
    policy, task = build_policy(checkpoint, "cpu"), make_task(checkpoint.cfg)
    if not isinstance(task, SimulatedTask):
        raise ValueError(f"{args.task} runs in an environment runner of diffusion_policy, which is not measured here")
    print(
        f"{args.task}, {args.episodes} episodes, {args.num_threads} thread(s), {os.cpu_count()} cores of "
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}"
    )
    steps_dir = ASSETS_ROOT / args.task / "original" / "optimal_steps" / "cosine"
    for name in ("cached", "plain"):
        if name == "cached":
            FastDiffusionPolicy.apply_cache(policy, optimal_steps_dir=steps_dir, num_caches=10, num_bu_blocks=5)
        else:
            FastDiffusionPolicy.remove_cache(policy)
        rollout = task.rollout(policy, range(FIRST_SEED, FIRST_SEED + args.episodes), n_workers=args.n_workers)
        seconds = sum(rollout.policy_seconds)
        print(
            f"{name}: policy {seconds:.1f} s in {len(rollout.policy_seconds)} calls, everything else "
            f"{rollout.env_seconds:.1f} s ({rollout.env_seconds / seconds:.0%}); score {rollout.mean_score:.3f}"
        )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="pusht", help="a task with a shipped policy (default: pusht)")
    parser.add_argument("--episodes", type=int, default=50, metavar="N", help="default: 50")
    parser.add_argument("--num_threads", type=int, default=1, metavar="N", help="of the policy (default: 1)")
    parser.add_argument("--n_workers", type=int, metavar="N", help="processes that step environments (default: cores)")
    add_debug_argument(parser)
    return run_command(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
