"""LeRobot data sets: what is written, what a killed process leaves, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from bacinfer.datasets import lerobot_format
from bacinfer.datasets.episode import EpisodeRecorder, RecordedEpisode
from bacinfer.datasets.features import Feature
from bacinfer.datasets.lerobot import LeRobotDatasetWriter
from bacinfer.datasets.statistics import (
    QUANTILES,
    STATISTICS,
    image_statistics,
    merge_statistics,
    number_statistics,
)
from lerobot_helpers import (
    CAMERA,
    EPISODES,
    FEATURES,
    FPS,
    NUM_MOVES,
    TASK,
    check_equal,
    commit,
    commit_cut_off,
    read_dataset,
    record,
)


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_frames_come_back(tmp_path: Path) -> None:
    commit(tmp_path / "data", EPISODES)
    check_equal(read_dataset(tmp_path / "data"), EPISODES)
    assert sorted(files(tmp_path / "data")) == [
        "data/chunk-000/file-000.parquet",
        "meta/episodes/chunk-000/file-000.parquet",
        "meta/info.json",
        "meta/stats.json",
        "meta/tasks.parquet",
        f"videos/{CAMERA}/chunk-000/file-000.mp4",
    ]
    info = json.loads((tmp_path / "data" / "meta" / "info.json").read_text())
    assert (info["codebase_version"], info["fps"], info["total_frames"]) == ("v3.0", FPS, 25)
    assert info["splits"] == {"train": "0:4"}
    assert info["features"][CAMERA]["shape"] == [64, 96, 3]
    assert info["features"][CAMERA]["info"]["video.codec"] == "av1"


def test_commits_add_files_and_leave_the_others_alone(tmp_path: Path) -> None:
    root = tmp_path / "data"
    commit(root, EPISODES[:2])
    first = files(root)
    with LeRobotDatasetWriter(root, FPS, FEATURES) as writer:
        assert (writer.num_episodes, writer.num_frames) == (2, 8)
        writer.commit([record(writer, EPISODES[2], task="Another task.")])
        writer.commit([record(writer, EPISODES[3])])
    found = read_dataset(root)
    check_equal(found, EPISODES)
    assert [episode[0]["task"] for episode in found] == [TASK, TASK, "Another task.", TASK]
    second = files(root)
    replaced = {"meta/info.json", "meta/stats.json", "meta/tasks.parquet"}
    assert {name for name in first if first[name] != second[name]} == replaced
    assert f"videos/{CAMERA}/chunk-000/file-002.mp4" in second


def test_a_chunk_holds_a_limited_number_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lerobot_format, "FILES_PER_CHUNK", 2)
    for episode in EPISODES[:3]:
        commit(tmp_path, [episode])
    check_equal(read_dataset(tmp_path), EPISODES[:3])
    assert (tmp_path / "data" / "chunk-001" / "file-000.parquet").is_file()


def test_a_data_set_without_a_camera(tmp_path: Path) -> None:
    features = {key: feature for key, feature in FEATURES.items() if key != CAMERA}
    with LeRobotDatasetWriter(tmp_path, 7, features, robot_type="arm") as writer:
        writer.commit([record(writer, [{key: frame[key] for key in features} for frame in EPISODES[0]])])
    rows = pq.read_table(tmp_path / "data").to_pylist()
    assert [row["timestamp"] for row in rows] == [np.float32(t / 7) for t in range(7)]
    info = json.loads((tmp_path / "meta" / "info.json").read_text())
    assert (info["video_path"], info["robot_type"]) == (None, "arm")


# -- statistics --------------------------------------------------------------------------------------------------


def test_statistics_of_an_episode_and_of_all(tmp_path: Path) -> None:
    for episodes in (EPISODES[:1], EPISODES[1:]):
        commit(tmp_path, episodes)
    rows = pq.read_table(tmp_path / "meta" / "episodes").to_pylist()
    for row, episode in zip(rows, EPISODES, strict=True):
        actions = np.stack([frame["action"] for frame in episode])
        for name in ("min", "max", "mean", "std"):
            np.testing.assert_allclose(row[f"stats/action/{name}"], getattr(actions, name)(axis=0), rtol=1e-5)
        assert row["stats/action/count"] == [len(episode)]
        assert row["stats/next.success/max"] == [bool(episode[-1]["next.success"])]
        assert row["stats/frame_index/max"] == [len(episode) - 1]

    statistics = json.loads((tmp_path / "meta" / "stats.json").read_text())
    assert set(statistics) == {*FEATURES, "timestamp", "frame_index", "episode_index", "index", "task_index"}
    everything = [frame for episode in EPISODES for frame in episode]
    actions = np.stack([frame["action"] for frame in everything])
    pixels = np.stack([frame[CAMERA] for frame in everything]) / 255
    for name in ("min", "max", "mean", "std"):
        np.testing.assert_allclose(statistics["action"][name], getattr(actions, name)(axis=0), rtol=1e-5)
        expected = getattr(pixels, name)(axis=(0, 1, 2)).reshape(3, 1, 1)
        np.testing.assert_allclose(statistics[CAMERA][name], expected, rtol=1e-9)
    assert statistics[CAMERA]["count"] == statistics["action"]["count"] == [25]


def test_quantiles() -> None:
    values = np.arange(1, 101, dtype=np.float32)[:, None]
    found = number_statistics(values)
    assert {name: float(found[name][0]) for name in QUANTILES} == {"q01": 1, "q10": 10, "q50": 50, "q90": 90, "q99": 99}
    image = np.random.default_rng(0).integers(0, 256, (1, 50, 2, 3)).astype(np.uint8)
    histogram = np.stack([np.bincount(image[..., c].ravel(), minlength=256) for c in range(3)])
    of_image, of_numbers = image_statistics(histogram, 1), number_statistics(image.reshape(-1, 3) / 255)
    for name in set(STATISTICS) - {"count"}:
        np.testing.assert_allclose(of_image[name].ravel(), of_numbers[name], atol=1e-12)
    merged = merge_statistics(
        {name: np.stack([found[name], found[name] + 1]) for name in STATISTICS} | {"count": np.array([[1], [3]])}
    )
    assert merged["q50"] == pytest.approx([50.75])


# -- interrupted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_commit", [True, False])
@pytest.mark.parametrize("moves", range(NUM_MOVES))
def test_a_commit_that_is_cut_off(tmp_path: Path, first_commit: bool, moves: int) -> None:
    """Whatever was moved to its place, the data set is the one before; the next run makes it whole."""
    root = tmp_path / "data"
    before, new = ([], EPISODES) if first_commit else (EPISODES[:2], EPISODES[2:])
    if before:
        commit(root, before)
    left_behind = commit_cut_off(root, new, moves)
    if before:
        check_equal(read_dataset(left_behind), before)
    else:
        assert not (left_behind / "meta" / "info.json").exists()

    commit(left_behind, new)
    check_equal(read_dataset(left_behind), EPISODES)
    commit(root, new)
    assert files(left_behind) == files(root)


def test_a_killed_process(tmp_path: Path) -> None:
    """SIGKILL while an episode is being recorded, after two commits."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from lerobot_helpers import *\n"
        "with LeRobotDatasetWriter(sys.argv[1], FPS, FEATURES) as writer:\n"
        "    for episode in EPISODES[:2]:\n"
        "        writer.commit([record(writer, episode)])\n"
        "    record(writer, EPISODES[2])\n"
        "    print('recorded', flush=True)\n"
        "    input()\n"
    )
    root = tmp_path / "data"
    process = subprocess.Popen(
        [sys.executable, "-c", code, root, Path(__file__).parents[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"recorded\n"
    with pytest.raises(RuntimeError, match="another process writes"):
        commit(root, EPISODES[2:])
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list((root / ".staging").iterdir())
    check_equal(read_dataset(root), EPISODES[:2])
    commit(root, EPISODES[2:])
    check_equal(read_dataset(root), EPISODES)
    assert not (root / ".staging").exists()


def test_what_is_not_committed_is_discarded(tmp_path: Path) -> None:
    commit(tmp_path, EPISODES[:1])
    before = files(tmp_path)
    with LeRobotDatasetWriter(tmp_path, FPS, FEATURES) as writer:
        record(writer, EPISODES[1])
        with pytest.raises(ValueError, match="a frame has"):
            record(writer, [EPISODES[1][0], {}], "1")
        assert not (writer.staging / "1").exists()
    assert files(tmp_path) == before


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(tmp_path, EPISODES[:2])
    before = files(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", full)
        with pytest.raises(OSError, match="No space left"):
            commit(tmp_path, EPISODES[2:])
    assert files(tmp_path) == before
    commit(tmp_path, EPISODES[2:])
    check_equal(read_dataset(tmp_path), EPISODES)


def test_a_video_that_lacks_frames(tmp_path: Path) -> None:
    with LeRobotDatasetWriter(tmp_path, FPS, FEATURES) as writer:
        shortened, whole = record(writer, EPISODES[0][:5], "short"), record(writer, EPISODES[0], "whole")
        os.replace(shortened.video(CAMERA), whole.video(CAMERA))
        with pytest.raises(OSError, match="5 of its 7 frames"):
            writer.commit([whole])
    assert files(tmp_path) == {}


# -- refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fps", "features", "message"),
    [
        (20, FEATURES, "fps 10 instead of 20"),
        (FPS, {**FEATURES, "action": Feature("float32", (4,))}, r"action .*\[3\].* instead of .*\[4\]"),
        (FPS, {**FEATURES, CAMERA: Feature.camera(64, 64)}, CAMERA),
    ],
)
def test_another_data_set(tmp_path: Path, fps: int, features: dict[str, Feature], message: str) -> None:
    commit(tmp_path, EPISODES[:1])
    before = files(tmp_path)
    with pytest.raises(ValueError, match=message):
        LeRobotDatasetWriter(tmp_path, fps, features)
    assert files(tmp_path) == before
    commit(tmp_path, EPISODES[1:])  # the lock is gone
    check_equal(read_dataset(tmp_path), EPISODES)


def test_a_data_set_that_lost_a_file(tmp_path: Path) -> None:
    commit(tmp_path, EPISODES[:1])
    commit(tmp_path, EPISODES[1:])
    (tmp_path / "meta" / "episodes" / "chunk-000" / "file-001.parquet").unlink()
    with pytest.raises(ValueError, match=r"counts 4 episodes, meta/episodes 1"):
        LeRobotDatasetWriter(tmp_path, FPS, FEATURES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({CAMERA: np.zeros((96, 64, 3), np.uint8)}, r"expected uint8 of shape \(64, 96, 3\)"),
        ({CAMERA: np.zeros((64, 96, 3), np.float32)}, "got float32"),
        ({"action": np.zeros(2)}, r"action: expected float32 of shape \(3,\)"),
        ({"next.success": 0.5}, "next.success: expected bool"),
        ({"next.done": True}, "next.done"),
    ],
)
def test_frames_that_do_not_fit(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with EpisodeRecorder(tmp_path / "episode", FPS, FEATURES, TASK) as episode:
        episode.add_frame(EPISODES[0][0])
        with pytest.raises(ValueError, match=message):
            episode.add_frame({**EPISODES[0][1], **change})
        episode.add_frame(EPISODES[0][1])
    recorded = RecordedEpisode.read(tmp_path / "episode")
    assert recorded.num_frames == len(recorded.numbers["action"]) == 2


def test_episodes_without_frames(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no frames"), EpisodeRecorder(tmp_path / "0", FPS, FEATURES, TASK):
        pass
    with LeRobotDatasetWriter(tmp_path / "data", FPS, FEATURES) as writer:
        with pytest.raises(ValueError, match="at least one episode"):
            writer.commit([])
        with pytest.raises(FileNotFoundError):
            RecordedEpisode.read(writer.staging / "1")


@pytest.mark.parametrize("shape", [(63, 96, 3), (32, 96, 3), (64, 96, 1), (64, 96)])
def test_camera_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="both sides even and at least 64"):
        Feature("video", shape)
    with pytest.raises(ValueError, match=r"shape \(n,\)"):
        Feature("float32", shape)


@pytest.mark.parametrize("module", ["av", "pyarrow"])
def test_missing_packages_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RuntimeError, match=r"bacinfer\[lerobot\]"):
        LeRobotDatasetWriter(tmp_path / "data", FPS, FEATURES)
    assert not (tmp_path / "data").exists()
