"""Rollouts of a policy, plain or cached, as a LeRobot data set.

The command behind ``bacinfer collect-data`` and ``scripts/collect_lerobot_data.py``. A frame is an environment step:
what was observed, the action, and what came of it. Episodes are rolled out and committed in batches; a batch that is
cut off is rolled out again by the next run.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bacinfer.analysis.residuals import file_digest
from bacinfer.commands.options import (
    add_cache_arguments,
    add_policy_arguments,
    apply_request,
    cache_request,
    load_policy_and_config,
    path_argument,
    run_command,
)
from bacinfer.core.cache_request import CacheRequest
from bacinfer.core.diffusion_cache_wrapper import FastDiffusionPolicy
from bacinfer.datasets.lerobot import EpisodeRecorder, Feature, LeRobotDatasetWriter, RecordedEpisode
from bacinfer.files import read_json, write_json
from bacinfer.tasks import Rollout, SimulatedTask, make_simulated_task
from bacinfer.tasks.episodes import Recorder, State

CAMERA = "observation.image"
COLLECTION_FILE = "collection.json"


# -- what a frame holds ------------------------------------------------------------------------------------------


def frame_features(obs_dim: int, action_dim: int, robot_state: slice, image_size: int) -> dict[str, Feature]:
    """The features of the data set of a task."""
    state_dim = len(range(*robot_state.indices(obs_dim)))
    return {
        CAMERA: Feature.camera(image_size, image_size),
        "observation.state": Feature("float32", (state_dim,)),
        "observation.environment_state": Feature("float32", (obs_dim - state_dim,)),
        "action": Feature("float32", (action_dim,)),
        "next.reward": Feature("float32", (1,)),
        "next.done": Feature("bool", (1,)),
        "next.success": Feature("bool", (1,)),
    }


@dataclass(frozen=True)
class EpisodeRecording:
    """Records the episode of each seed into a directory of its own; see `SimulatedTask.rollout`."""

    directory: Path
    fps: int
    features: Mapping[str, Feature]
    task: str
    robot_state: slice

    @contextmanager
    def __call__(self, seed: int) -> Iterator[Recorder]:
        with EpisodeRecorder(self.directory / str(seed), self.fps, self.features, self.task) as episode:
            before: dict[str, Any] = {}  # what was observed before the action that leads to the next state

            def record(state: State) -> None:
                nonlocal before
                if state.action is not None:
                    outcome = {
                        "action": state.action,
                        "next.reward": state.reward,
                        "next.done": state.done,
                        "next.success": state.solved,
                    }
                    episode.add_frame(before | outcome)
                if not state.done:
                    before = self._observed(state)

            yield record

    def _observed(self, state: State) -> dict[str, Any]:
        observation = np.asarray(state.observation)
        return {
            CAMERA: state.camera(self.features[CAMERA].shape[0]),
            "observation.state": observation[self.robot_state],
            "observation.environment_state": np.delete(observation, self.robot_state),
        }


# -- what was collected ------------------------------------------------------------------------------------------


class Collection:
    """The record of a collection, ``collection.json`` beside the data set: its settings, and all episodes in batches.

    A batch is written here before it is committed to the data set. The data set decides whether it counts.

    Raises:
        ValueError: the directory holds a collection with other settings, or something else.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        self._path = directory / COLLECTION_FILE
        self._settings = dict(settings)
        self.batches: list[list[dict[str, Any]]] = []
        if self._path.is_file():
            recorded, self.batches = self._read()
            differing = [name for name in settings if recorded.get(name) != settings[name]]
            if differing:
                found = ", ".join(f"{name} {recorded.get(name)} instead of {settings[name]}" for name in differing)
                raise ValueError(f"{directory} holds data collected with {found}: give another --output_dir")
        elif directory.exists() and any(not path.name.startswith(".") for path in directory.iterdir()):
            raise ValueError(f"{directory} is not empty, and not a data set of this command: give another --output_dir")

    def _read(self) -> tuple[dict[str, Any], list[list[dict[str, Any]]]]:
        """The settings and the batches on disk."""
        record = read_json(self._path)
        try:
            settings, batches = record["settings"], record["batches"]
            if isinstance(settings, dict) and all({"seed", "kept"} <= episode.keys() for b in batches for episode in b):
                return settings, batches
        except (AttributeError, KeyError, TypeError):
            pass
        raise ValueError(f"{self._path} is no record of a collection: give another --output_dir")

    @property
    def episodes(self) -> list[dict[str, Any]]:
        """Every episode that was rolled out: seed, score, success, steps, and whether it is in the data set."""
        return [episode for batch in self.batches for episode in batch]

    @property
    def num_kept(self) -> int:
        return sum(episode["kept"] for episode in self.episodes)

    def reconcile(self, num_episodes: int) -> None:
        """Forgets a last batch that did not get into the data set, which has `num_episodes`.

        Raises:
            ValueError: the data set has other episodes than those recorded.
        """
        if self.num_kept > num_episodes:
            self.batches.pop()
        if self.num_kept != num_episodes:
            raise ValueError(
                f"{self._path.parent} has {num_episodes} episodes, but {COLLECTION_FILE} tells of {self.num_kept}: "
                "something else has changed it"
            )

    def add(self, batch: list[dict[str, Any]]) -> None:
        self.batches.append(batch)
        write_json(self._path, {"settings": self._settings, "batches": self.batches})


def collect(
    policy: Any,
    task: SimulatedTask,
    writer: LeRobotDatasetWriter,
    collection: Collection,
    seeds: Sequence[int],
    *,
    n_envs: int,
    only_successful: bool = False,
) -> None:
    """Rolls out the seeds that are not in the collection yet, `n_envs` at a time, and commits them batch by batch.

    Raises:
        RuntimeError: all episodes of a batch failed.
        OSError: the disk is full; the batches before are safe.
    """
    collection.reconcile(writer.num_episodes)
    recording = EpisodeRecording(
        writer.staging.absolute(), task.fps, writer.features, task.description, task.robot_state
    )
    while waiting := seeds[len(collection.episodes) :]:
        batch = waiting[:n_envs]
        done = len(collection.episodes)
        print(f"episodes {done + 1} to {done + len(batch)} of {len(seeds)}", flush=True)
        try:
            rollout = task.rollout(policy, batch, n_envs=n_envs, recordings=[recording])
        except RuntimeError as error:
            _check_disk([str(error)], writer.root)
            raise
        _check_disk(rollout.failures.values(), writer.root)
        episodes = {seed: RecordedEpisode.read(writer.staging / str(seed)) for seed in batch if seed in rollout.scores}
        outcomes = [_outcome(seed, rollout, episodes.get(seed), only_successful) for seed in batch]
        collection.add(outcomes)
        kept = [episodes[outcome["seed"]] for outcome in outcomes if outcome["kept"]]
        if kept:
            writer.commit(kept)


def _outcome(seed: int, rollout: Rollout, episode: RecordedEpisode | None, only_successful: bool) -> dict[str, Any]:
    """What the record says of an episode; one that failed has none."""
    if episode is None:
        return {"seed": seed, "kept": False, "error": rollout.failures[seed]}
    success = bool(episode.numbers["next.success"].any())
    return {
        "seed": seed,
        "kept": success or not only_successful,
        "success": success,
        "score": rollout.scores[seed],
        "steps": episode.num_frames,
    }


def _check_disk(errors: Iterable[str], root: Path) -> None:
    """An episode that found no space has to be rolled out again: it does not count as failed."""
    full = os.strerror(errno.ENOSPC)
    if any(full in error for error in errors):
        raise OSError(errno.ENOSPC, full, str(root))


# -- the command -------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Rolls out a policy and writes a LeRobot data set (LeRobotDataset v3.0). An interrupted run goes "
        "on where it was; a larger --num_episodes adds to what is there."
    )
    add_policy_arguments(parser)
    parser.add_argument(
        "-o", "--output_dir", required=True, type=path_argument, metavar="OUT", help="where the data set is written"
    )
    parser.add_argument("--num_episodes", type=int, default=50, metavar="N", help="how many to roll out (default: 50)")
    parser.add_argument(
        "--seed",
        type=int,
        default=1000,
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
    simulator = task.simulator(args.seed)  # whatever is missing shows here, before anything slow
    simulator.camera(args.image_size)
    features = frame_features(len(simulator.observation), policy.action_dim, task.robot_state, args.image_size)

    output_dir = args.output_dir
    seeds = range(args.seed, args.seed + args.num_episodes)
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
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: expected no negative number")


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
        "seed": args.seed,
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


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(run, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
