"""Episodes for LeRobot data sets, and a reader that follows the format's rules and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from bacinfer.datasets.episode import EpisodeRecorder, RecordedEpisode
from bacinfer.datasets.features import Feature
from bacinfer.datasets.lerobot import LeRobotDatasetWriter
from bacinfer.tasks import SimulatedTask
from bacinfer.tasks.episodes import Recorder, State

FPS = 10
CAMERA = "observation.image"
FEATURES = {
    CAMERA: Feature.camera(64, 96),
    "observation.state": Feature("float32", (2,), ("x", "y")),
    "action": Feature("float32", (3,)),
    "next.reward": Feature("float32", (1,)),
    "next.success": Feature("bool", (1,)),
}
TASK = "Push the block."

Frames = list[dict[str, Any]]


def frames(length: int, seed: int) -> Frames:
    """An episode of random numbers, and of pictures whose colours tell one frame from another."""
    random = np.random.default_rng(seed)
    ramp = np.linspace(0, 60, 96)[None, :].repeat(64, axis=0)
    return [
        {
            CAMERA: np.stack([ramp + 40 * (t % 5), ramp[:, ::-1] + 30 * (seed % 6), ramp], axis=-1).astype(np.uint8),
            "observation.state": random.uniform(0, 512, 2).astype(np.float32),
            "action": random.normal(size=3).astype(np.float32),
            "next.reward": np.array([random.uniform()], dtype=np.float32),
            "next.success": np.array([t == length - 1 and seed % 2 == 0]),
        }
        for t in range(length)
    ]


EPISODES = [frames(length, seed) for seed, length in enumerate((7, 1, 12, 5))]


def record(writer: LeRobotDatasetWriter, episode: Frames, name: str = "0", task: str = TASK) -> RecordedEpisode:
    with EpisodeRecorder(writer.staging / name, writer.fps, writer.features, task) as recorder:
        for frame in episode:
            recorder.add_frame(frame)
    return RecordedEpisode.read(writer.staging / name)


def commit(root: Path, episodes: Sequence[Frames], task: str = TASK) -> None:
    """One commit of the episodes."""
    with LeRobotDatasetWriter(root, FPS, FEATURES) as writer:
        writer.commit([record(writer, episode, str(i), task) for i, episode in enumerate(episodes)])


NUM_MOVES = 6
"""Files of a commit: video, frames, tasks, episodes, statistics, info."""


def commit_cut_off(root: Path, episodes: Sequence[Frames], moves: int) -> Path:
    """What a process leaves that is killed in a commit once it has moved `moves` files to their places: a copy."""
    left_behind = root.with_name(f"{root.name}_after_{moves}_moves")
    count, replace = 0, os.replace

    def replace_until(source: Any, target: Any) -> None:
        nonlocal count
        if root / ".staging" not in Path(target).parents:
            if count == moves:
                shutil.copytree(root, left_behind)
                raise KeyboardInterrupt
            count += 1
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace_until)
        with pytest.raises(KeyboardInterrupt):
            commit(root, episodes)
    return left_behind


def read_dataset(root: Path) -> list[Frames]:
    """The episodes that count, each frame with its task and decoded image; checks how the tables fit together."""
    info = json.loads((root / "meta" / "info.json").read_text())
    episodes = _rows(root / "meta" / "episodes")[: info["total_episodes"]]
    rows = _rows(root / "data")
    tasks = {
        row["task_index"]: row["__index_level_0__"] for row in pq.read_table(root / "meta/tasks.parquet").to_pylist()
    }
    assert len(episodes) == info["total_episodes"]
    assert sum(episode["length"] for episode in episodes) == info["total_frames"] <= len(rows)
    found = []
    for number, episode in enumerate(episodes):
        assert episode["episode_index"] == number
        start, end = episode["dataset_from_index"], episode["dataset_to_index"]
        assert end - start == episode["length"]
        images = _decode(root, info, episode)
        found.append([])
        for t, (row, image) in enumerate(zip(rows[start:end], images, strict=True)):
            assert (row["episode_index"], row["frame_index"], row["index"]) == (number, t, start + t)
            assert row["timestamp"] == np.float32(t / info["fps"])
            assert [tasks[row["task_index"]]] == episode["tasks"]
            found[-1].append({**row, "task": tasks[row["task_index"]], CAMERA: image})
    return found


def rollout_frames(policy: Any, task: SimulatedTask, seeds: Sequence[int], image_size: int = 96) -> list[Frames]:
    """What a data set of these episodes, rolled out in one batch, has to hold."""
    states: dict[int, list[tuple[State, Any]]] = {seed: [] for seed in seeds}

    @contextmanager
    def remember(seed: int) -> Iterator[Recorder]:
        yield lambda state: states[seed].append((state, state.camera(image_size)))

    task.rollout(policy, seeds, n_envs=len(seeds), n_workers=0, recordings=[remember])
    return [
        [
            {
                CAMERA: picture,
                **{
                    f"observation.{name}": before.observation[entry][part].astype(np.float32)
                    for name, (entry, part) in task.state_vectors.items()
                },
                "action": np.asarray(after.action, dtype=np.float32),
                "next.reward": np.array([after.reward], dtype=np.float32),
                "next.done": np.array([after is states[seed][-1][0]]),
                "next.success": np.array([after.solved]),
            }
            for (before, picture), (after, _) in pairwise(states[seed])
        ]
        for seed in seeds
    ]


def check_equal(found: Sequence[Frames], expected: Sequence[Frames]) -> None:
    """Numbers are equal; images as near as the video encoder leaves them, and nearer to their frame than to others."""
    assert [len(episode) for episode in found] == [len(episode) for episode in expected]
    for episode, wanted in zip(found, expected, strict=True):
        for row, frame in zip(episode, wanted, strict=True):
            check_numbers(row, frame)
            assert np.abs(row[CAMERA].astype(int) - frame[CAMERA]).mean() < 4  # the next frame differs by 40/3 at least


def check_numbers(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """All features but the camera. A simulation repeats exactly, the area that a reward is made of up to rounding."""
    for key in expected.keys() - {CAMERA}:
        tolerance = 1e-6 if key == "next.reward" else 0
        np.testing.assert_allclose(np.ravel(found[key]), expected[key], rtol=0, atol=tolerance, err_msg=key)


def _rows(directory: Path) -> list[dict[str, Any]]:
    """All files two levels below, as lerobot reads them."""
    return [row for path in sorted(directory.glob("*/*.parquet")) for row in pq.read_table(path).to_pylist()]


def _decode(root: Path, info: dict[str, Any], episode: dict[str, Any]) -> list[np.ndarray]:
    place = {name: episode[f"videos/{CAMERA}/{name}"] for name in ("chunk_index", "file_index")}
    with av.open(str(root / info["video_path"].format(video_key=CAMERA, **place))) as container:
        images = {float(f.pts * f.time_base): f.to_ndarray(format="rgb24") for f in container.decode(video=0)}
    start = episode[f"videos/{CAMERA}/from_timestamp"]
    wanted = [start + t / info["fps"] for t in range(episode["length"])]
    nearest = [min(images, key=lambda time, query=query: abs(time - query)) for query in wanted]
    np.testing.assert_allclose(nearest, wanted, atol=1e-4)  # lerobot's tolerance
    np.testing.assert_allclose(episode[f"videos/{CAMERA}/to_timestamp"], wanted[-1] + 1 / info["fps"])
    return [images[time] for time in nearest]
