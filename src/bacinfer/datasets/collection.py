"""Collects rollouts of a policy in a LeRobot data set.

Episodes are rolled out and committed in batches; a batch that is cut off is rolled out again by the next run.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bacinfer.datasets.episode import RecordedEpisode
from bacinfer.datasets.lerobot import LeRobotDatasetWriter
from bacinfer.datasets.rollout_recording import EpisodeRecording
from bacinfer.files import read_json, write_json
from bacinfer.tasks import Rollout, SimulatedTask

COLLECTION_FILE = "collection.json"


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
        writer.staging.absolute(), task.fps, writer.features, task.description, task.state_vectors
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
