"""Rollouts of a policy, plain or cached, as a LeRobot data set.

The command behind ``bacinfer collect-data`` and ``scripts/collect_lerobot_data.py``.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import sys
from pathlib import Path
from typing import Any

from bacinfer.analysis.residuals import file_digest
from bacinfer.commands.options import (
    add_cache_arguments,
    add_output_argument,
    add_policy_arguments,
    apply_request,
    cache_request,
    command_line,
    load_policy_and_config,
)
from bacinfer.core.cache_request import CacheRequest
from bacinfer.core.diffusion_cache_wrapper import FastDiffusionPolicy
from bacinfer.datasets.collection import Collection, collect
from bacinfer.datasets.lerobot import LeRobotDatasetWriter
from bacinfer.datasets.rollout_recording import frame_features
from bacinfer.tasks import SimulatedTask, make_simulated_task


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Rolls out a policy and writes a LeRobot data set (LeRobotDataset v3.0). An interrupted run goes "
        "on where it was; a larger --num_episodes adds to what is there."
    )
    add_policy_arguments(parser)
    add_output_argument(parser, "where the data set is written")
    parser.add_argument("--num_episodes", type=int, default=50, metavar="N", help="how many to roll out (default: 50)")
    parser.add_argument(
        "--first_episode_seed",
        "--seed",
        type=int,
        default=1000,
        metavar="SEED",
        help="seed of the first episode's initial state; the others follow (default: 1000; scores are reported for "
        "seeds from 100000)",
    )
    parser.add_argument(
        "--only_successful", action="store_true", help="leave out the episodes that do not solve the task"
    )
    parser.add_argument(
        "--image_size", type=int, default=96, metavar="PIXELS", help="side of the camera's pictures (default: 96)"
    )
    parser.add_argument(
        "--n_envs", type=int, default=16, metavar="N", help="episodes side by side, and in a commit (default: 16)"
    )
    add_cache_arguments(parser)
    parser.add_argument(
        "--use_bac",
        action="store_true",
        help="roll out the cached policy instead of the plain one (--cache_mode is optimal then by default)",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    _check_arguments(args)
    request = _cache_request(args)
    policy, checkpoint = load_policy_and_config(args)
    task = make_simulated_task(checkpoint.cfg)
    apply_request(policy, request, args.engine)
    simulator = task.simulator(args.first_episode_seed)  # whatever is missing shows here, before anything slow
    simulator.camera(args.image_size)
    features = frame_features(task.state_vectors, simulator.observation, policy.action_dim, args.image_size)

    output_dir = args.output_dir
    seeds = range(args.first_episode_seed, args.first_episode_seed + args.num_episodes)
    collection = Collection(output_dir, collection_settings(args, policy, task))
    with LeRobotDatasetWriter(output_dir, task.fps, features, robot_type=task.name) as writer:
        try:
            collect(policy, task, writer, collection, seeds, n_envs=args.n_envs, only_successful=args.only_successful)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise OSError(
                f"the disk is full: {output_dir} has {writer.num_episodes} complete episodes; make room and run the "
                "same command again to go on"
            ) from error
        return _report(collection, writer)


def _check_arguments(args: argparse.Namespace) -> None:
    for flag in ("num_episodes", "n_envs"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag} {getattr(args, flag)}: expected at least 1")
    if args.first_episode_seed < 0:
        raise ValueError(f"--first_episode_seed {args.first_episode_seed}: expected no negative number")


def _cache_request(args: argparse.Namespace) -> CacheRequest:
    """Raises ValueError if the flags ask for a cached policy and for the plain one."""
    request = cache_request(args, default_mode="optimal" if args.use_bac else "original")
    if args.use_bac and request.mode == "original":
        raise ValueError("--use_bac rolls out a cached policy, --cache_mode original the plain one: give one of them")
    if not args.use_bac and request.mode != "original":
        raise ValueError(
            f"cache_mode {request.mode!r} without --use_bac: give both, or no flag of a cache for the plain policy"
        )
    return request


def collection_settings(args: argparse.Namespace, policy: Any, task: SimulatedTask) -> dict[str, Any]:
    """What the episodes depend on."""
    schedule = FastDiffusionPolicy.summary(policy).schedule
    return {
        "checkpoint": Path(args.checkpoint).name,
        "checkpoint_sha256": file_digest(args.checkpoint),
        "task": task.name,
        "num_inference_steps": policy.num_inference_steps,
        "cache": schedule.label if schedule else "original",
        "schedule_sha256": hashlib.sha256(schedule.to_json().encode()).hexdigest() if schedule else None,
        "seed": args.first_episode_seed,
        "n_envs": args.n_envs,
        "only_successful": args.only_successful,
        "image_size": args.image_size,
    }


def _report(collection: Collection, writer: LeRobotDatasetWriter) -> int:
    """Prints what there is; raises RuntimeError if that is nothing."""
    episodes = collection.episodes
    failed = [episode for episode in episodes if "error" in episode]
    successes = sum(episode.get("success", False) for episode in episodes)
    print(
        f"{writer.root}: {writer.num_episodes} episodes, {writer.num_frames} frames at {writer.fps} a second; "
        f"{successes} of {len(episodes)} rollouts solved the task"
    )
    for episode in failed:
        print(f"error: seed {episode['seed']} failed and is left out: {episode['error']}", file=sys.stderr)
    if not writer.num_episodes:
        raise RuntimeError(
            f"none of the {len(episodes)} rollouts solved the task, so that there is no data set: evaluate the policy, "
            "or leave out --only_successful"
        )
    if not successes:
        print(f"warning: no episode in {writer.root} solves the task", file=sys.stderr)
    return 1 if failed else 0


main = command_line(run, build_parser)

if __name__ == "__main__":
    sys.exit(main())
