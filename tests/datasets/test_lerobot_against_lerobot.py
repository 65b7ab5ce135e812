"""LeRobot data sets against lerobot itself, where it is installed: it reads ours, and writes the same."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from bacinfer.commands.collect_data import main
from bacinfer.datasets.lerobot import LeRobotDatasetWriter
from bacinfer.policies import load_policy
from bacinfer.tasks import PushTTask
from lerobot_helpers import (
    CAMERA,
    EPISODES,
    FEATURES,
    FPS,
    NUM_MOVES,
    TASK,
    Frames,
    check_equal,
    check_numbers,
    commit,
    commit_cut_off,
    frames,
    read_dataset,
    record,
    rollout_frames,
)
from small_experiments import MAX_STEPS

if importlib.util.find_spec("lerobot") is None:
    pytest.skip("needs lerobot, in an environment of its own", allow_module_level=True)
import lerobot
from lerobot.datasets.lerobot_dataset import LeRobotDataset

of_its_writer = pytest.mark.skipif(
    not lerobot.__version__.startswith("0.4."),
    reason="what is written equals what lerobot 0.4 writes; later ones read it, and name more settings of the encoder",
)
BACKENDS = ["pyav", *(["torchcodec"] if shutil.which("ffmpeg") else [])]
LONG_EPISODES = [frames(length, seed) for seed, length in enumerate((30, 90, 45))]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def load(root: Path, video_backend: str = "pyav", **arguments: Any) -> Any:
    return LeRobotDataset("bacinfer/test", root=root, video_backend=video_backend, **arguments)


def check_read(dataset: Any, expected: Sequence[Frames], task: str = TASK) -> None:
    """Every frame as lerobot gives it: numbers exactly, images as near as the encoder leaves them."""
    everything = [(e, t, frame) for e, episode in enumerate(expected) for t, frame in enumerate(episode)]
    assert (len(dataset), dataset.num_episodes) == (len(everything), len(expected))
    for i, (e, t, frame) in enumerate(everything):
        item = dataset[i]
        assert (item["episode_index"], item["frame_index"], item["index"], item["task"]) == (e, t, i, task)
        check_numbers(item, frame)
        assert all(item[key].numpy().dtype == value.dtype for key, value in frame.items() if key != CAMERA)
        image = torch.from_numpy(frame[CAMERA]).permute(2, 0, 1) / 255
        assert item[CAMERA].dtype == torch.float32
        assert (item[CAMERA] - image).abs().mean() < 4 / 255


@pytest.mark.parametrize("backend", BACKENDS)
def test_lerobot_reads_it(tmp_path: Path, backend: str) -> None:
    for episodes in (EPISODES[:2], EPISODES[2:3], EPISODES[3:]):
        commit(tmp_path, episodes)
    check_read(load(tmp_path, backend), EPISODES)


@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_of_frames_and_chosen_episodes(tmp_path: Path, backend: str) -> None:
    for episodes in (EPISODES[:2], EPISODES[2:]):
        commit(tmp_path, episodes)
    dataset = load(tmp_path, backend, delta_timestamps={"action": [-0.1, 0, 0.1], CAMERA: [-0.1, 0]}, episodes=[2])
    assert len(dataset) == 12
    batch = next(iter(torch.utils.data.DataLoader(dataset, batch_size=12)))
    assert batch[CAMERA].shape == (12, 2, 3, 64, 96)
    actions = np.stack([frame["action"] for frame in EPISODES[2]])
    np.testing.assert_array_equal(batch["action"][1:-1], np.stack([actions[:-2], actions[1:-1], actions[2:]], axis=1))
    assert batch["action_is_pad"].sum() == 2
    assert torch.equal(batch[CAMERA][1:, 0], batch[CAMERA][:-1, 1])


@pytest.mark.parametrize("moves", range(NUM_MOVES))
def test_lerobot_reads_what_a_killed_process_leaves(tmp_path: Path, moves: int) -> None:
    commit(tmp_path / "data", EPISODES[:2])
    left_behind = commit_cut_off(tmp_path / "data", EPISODES[2:], moves)
    check_read(load(left_behind), EPISODES[:2])
    commit(left_behind, EPISODES[2:])
    check_read(load(left_behind), EPISODES)


def test_lerobot_reads_rollouts(tmp_path: Path, checkpoint: Path) -> None:
    assert main([f"--checkpoint={checkpoint}", f"--output_dir={tmp_path}", "--num_episodes=3"]) == 0
    task = PushTTask(max_steps=MAX_STEPS)
    check_read(load(tmp_path), rollout_frames(load_policy(checkpoint), task, range(1000, 1003)), task.description)


# -- against its own writer --------------------------------------------------------------------------------------


def write_with_lerobot(dataset: Any, episodes: Sequence[Frames]) -> None:
    for episode in episodes:
        for frame in episode:
            dataset.add_frame({**frame, "task": TASK})
        dataset.save_episode()
    dataset.finalize()


def create_with_lerobot(root: Path, episodes: Sequence[Frames]) -> Path:
    features = {
        key: {"dtype": feature.dtype, "shape": feature.shape, "names": feature.names}
        for key, feature in FEATURES.items()
    }
    write_with_lerobot(LeRobotDataset.create("bacinfer/test", fps=FPS, features=features, root=root), episodes)
    return root


@pytest.fixture(scope="module")
def ours_and_theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same frames, written by us and by lerobot."""
    root = tmp_path_factory.mktemp("both")
    commit(root / "ours", LONG_EPISODES)
    return root / "ours", create_with_lerobot(root / "theirs", LONG_EPISODES)


@of_its_writer
def test_the_same_files_and_info(ours_and_theirs: tuple[Path, Path]) -> None:
    names = [
        sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()) for root in ours_and_theirs
    ]
    assert names[0] == names[1]
    ours, theirs = (json.loads((root / "meta" / "info.json").read_text()) for root in ours_and_theirs)
    assert ours == theirs
    assert list(ours) == list(theirs)
    assert list(ours["features"]) == list(theirs["features"])


def test_the_same_frames(ours_and_theirs: tuple[Path, Path]) -> None:
    """Decoded images too: both use the same encoder with the same settings."""
    ours, theirs = (load(root) for root in ours_and_theirs)
    assert len(ours) == len(theirs) == 165
    for i in range(len(ours)):
        mine, other = ours[i], theirs[i]
        assert mine.keys() == other.keys()
        assert mine.pop("task") == other.pop("task")
        assert all(torch.equal(mine[key], other[key]) and mine[key].dtype == other[key].dtype for key in other)


@of_its_writer
@pytest.mark.parametrize("table", ["data", "meta/episodes"])
def test_the_same_columns_and_types(ours_and_theirs: tuple[Path, Path], table: str) -> None:
    ours, theirs = (
        pq.read_schema(root / table / "chunk-000" / "file-000.parquet").remove_metadata() for root in ours_and_theirs
    )
    assert ours.equals(theirs)


def test_the_same_episodes_and_tasks(ours_and_theirs: tuple[Path, Path]) -> None:
    ours, theirs = (pq.read_table(root / "meta" / "episodes").to_pylist() for root in ours_and_theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert {k: v for k, v in mine.items() if "stats/" not in k} == {
            k: v for k, v in other.items() if "stats/" not in k
        }
    ours, theirs = (load(root).meta.tasks for root in ours_and_theirs)
    assert ours.to_dict() == theirs.to_dict() == {"task_index": {TASK: 0}}


@of_its_writer
def test_the_same_statistics(ours_and_theirs: tuple[Path, Path]) -> None:
    """Up to rounding, quantiles up to the width of lerobot's 5,000 bins.

    All but the spread of pixels, which lerobot 0.4.4 gets wrong: it squares them as uint8.
    """
    ours, theirs = (json.loads((root / "meta" / "stats.json").read_text()) for root in ours_and_theirs)
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert ours[key].keys() == theirs[key].keys()
        mine, other = ({name: np.array(values) for name, values in stats[key].items()} for stats in (ours, theirs))
        spread = float((mine["max"].astype(float) - mine["min"]).max())
        for name in mine:
            assert mine[name].shape == other[name].shape
            if (key, name) != (CAMERA, "std"):
                bound = 1 / 5000 if name.startswith("q") else 1e-6
                np.testing.assert_allclose(mine[name].astype(float), other[name], atol=bound * spread + 1e-9)
    pixels = np.stack([frame[CAMERA] for episode in LONG_EPISODES for frame in episode]) / 255
    np.testing.assert_allclose(np.ravel(ours[CAMERA]["std"]), pixels.std(axis=(0, 1, 2)), rtol=1e-9)


def test_lerobot_goes_on_with_ours_and_we_with_its(tmp_path: Path) -> None:
    commit(tmp_path, EPISODES[:1])
    write_with_lerobot(getattr(LeRobotDataset, "resume", LeRobotDataset)("bacinfer/test", root=tmp_path), EPISODES[1:3])
    with LeRobotDatasetWriter(tmp_path, FPS, FEATURES) as writer:
        writer.commit([record(writer, EPISODES[3])])
    check_equal(read_dataset(tmp_path), EPISODES)
    check_read(load(tmp_path), EPISODES)
