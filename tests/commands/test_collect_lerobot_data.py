"""Collecting rollouts as a LeRobot data set, from a checkpoint to its frames."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bacinfer.commands.collect_data import main
from bacinfer.datasets.collection import Collection, collect
from bacinfer.datasets.episode import EpisodeRecorder
from bacinfer.datasets.lerobot import LeRobotDatasetWriter
from bacinfer.datasets.rollout_recording import frame_features
from bacinfer.policies import load_policy
from bacinfer.tasks import PushTTask
from lerobot_helpers import CAMERA, Frames, check_equal, commit, frames, read_dataset, rollout_frames
from simulated_task import NoisyPolicy, WalkTask
from small_experiments import MAX_STEPS

SCRIPT = Path(__file__).parents[2] / "scripts" / "collect_lerobot_data.py"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def arguments(checkpoint: Path, root: Path) -> list[str]:
    return [f"--checkpoint={checkpoint}", f"--output_dir={root}", "--n_envs=2", "--image_size=64"]


def bac(steps_dir: Path) -> list[str]:
    return ["--use_bac", f"--optimal_steps_dir={steps_dir}", "--num_caches=3"]


def collection(root: Path) -> dict[str, Any]:
    return json.loads((root / "collection.json").read_text())


def outcomes(root: Path) -> list[dict[str, Any]]:
    return [episode for batch in collection(root)["batches"] for episode in batch]


def rows(root: Path) -> list[Frames]:
    return read_dataset(root)


def check_same(found: Sequence[Frames], expected: Sequence[Frames]) -> None:
    """The same numbers (rewards repeat up to rounding), and the same pictures."""
    assert [len(episode) for episode in found] == [len(episode) for episode in expected]
    for episode, wanted in zip(found, expected, strict=True):
        for row, other in zip(episode, wanted, strict=True):
            assert row.keys() == other.keys()
            for key in row.keys() - {"task"}:
                np.testing.assert_allclose(row[key], other[key], atol=1e-6 if key == "next.reward" else 0)


# -- what a frame holds ------------------------------------------------------------------------------------------


def test_a_frame_is_a_step_of_the_rollout(checkpoint: Path, root: Path) -> None:
    """Eight episodes at once: they are stepped and recorded in another process."""
    assert main([f"--checkpoint={checkpoint}", f"--output_dir={root}", "--n_envs=8", "--num_episodes=8"]) == 0
    expected = rollout_frames(load_policy(checkpoint), PushTTask(max_steps=MAX_STEPS), range(1000, 1008))
    assert [len(episode) for episode in expected] == [MAX_STEPS] * 8
    found = rows(root)
    check_equal(found, expected)
    assert found[0][0]["observation.state"] == list(PushTTask().simulator(1000).observation["obs"][18:])
    assert {row["task"] for row in found[0]} == {"Push the T-shaped block onto the T-shaped target."}
    moved = np.abs(found[0][0][CAMERA].astype(int) - found[0][-1][CAMERA]).max()
    assert moved > 50
    info = json.loads((root / "meta" / "info.json").read_text())
    assert (info["fps"], info["robot_type"]) == (10, "pusht")
    assert info["features"][CAMERA]["shape"] == [96, 96, 3]


def test_plain_and_cached(arguments: list[str], root: Path, tmp_path: Path, steps_dir: Path) -> None:
    assert main([*arguments, "--num_episodes=2"]) == 0
    plain, settings = rows(root), collection(root)["settings"]
    assert (settings["cache"], settings["schedule_sha256"]) == ("original", None)
    shutil.rmtree(root)
    assert main([*arguments, "--num_episodes=2", *bac(steps_dir)]) == 0
    cached, settings = rows(root), collection(root)["settings"]
    assert settings["cache"].startswith("optimal")
    assert len(settings["schedule_sha256"]) == 64
    np.testing.assert_array_equal(plain[0][0]["observation.state"], cached[0][0]["observation.state"])
    assert np.abs(np.array(plain[0][0]["action"]) - cached[0][0]["action"]).max() > 0.1


def test_record_of_the_episodes(arguments: list[str], root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--num_episodes=3", "--seed=5"]) == 0
    record = collection(root)
    assert [[episode["seed"] for episode in batch] for batch in record["batches"]] == [[5, 6], [7]]
    for episode, found in zip(outcomes(root), rows(root), strict=True):
        assert episode["steps"] == len(found)
        assert episode["score"] == pytest.approx(max(row["next.reward"] for row in found), abs=1e-6)
        assert episode["kept"]
    printed = capsys.readouterr()
    assert "3 episodes, 72 frames at 10 a second; 0 of 3 rollouts solved the task" in printed.out
    assert "warning: no episode" in printed.err


# -- interrupted -------------------------------------------------------------------------------------------------


@pytest.fixture
def uninterrupted(arguments: list[str], root: Path) -> list[Frames]:
    assert main([*arguments, "--num_episodes=5"]) == 0
    found = rows(root)
    shutil.rmtree(root)
    return found


def interrupt_in_batch(patch: pytest.MonkeyPatch, number: int) -> None:
    count, rollout = 0, PushTTask.rollout

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            raise KeyboardInterrupt
        return rollout(*args, **kwargs)

    patch.setattr(PushTTask, "rollout", interrupted)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_an_interrupted_run_goes_on(
    arguments: list[str], root: Path, uninterrupted: list[Frames], monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    root.mkdir()
    (root / ".collection.part.json").write_text("{")  # left by a process killed as it began to write
    with monkeypatch.context() as patch:
        interrupt_in_batch(patch, batch)
        assert main([*arguments, "--num_episodes=5"]) == 130
    if batch > 1:
        check_same(rows(root), uninterrupted[: 2 * (batch - 1)])
    assert main([*arguments, "--num_episodes=5"]) == 0
    check_same(rows(root), uninterrupted)


def test_cut_off_between_the_record_and_the_data_set(
    arguments: list[str], root: Path, uninterrupted: list[Frames], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*arguments, "--num_episodes=2"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(LeRobotDatasetWriter, "commit", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main([*arguments, "--num_episodes=5"])
    assert len(collection(root)["batches"]) == 2
    assert main([*arguments, "--num_episodes=5"]) == 0
    assert [[episode["seed"] for episode in batch] for batch in collection(root)["batches"]] == [
        [1000, 1001],
        [1002, 1003],
        [1004],
    ]
    check_same(rows(root), uninterrupted)


def test_a_killed_command_goes_on(arguments: list[str], root: Path, uninterrupted: list[Frames]) -> None:
    command = [sys.executable, SCRIPT, *arguments, "--num_episodes=200"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (root / "meta" / "info.json").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = rows(root)
    assert 2 <= len(left) < 200
    check_same(left[:4], uninterrupted[: min(len(left), 4)])
    assert main([*arguments, f"--num_episodes={len(left) + 1}"]) == 0
    check_same(rows(root)[:-1], left)


def test_more_episodes_later(arguments: list[str], root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--num_episodes=2"]) == 0
    first = rows(root)
    assert main([*arguments, "--num_episodes=2"]) == 0  # nothing to do
    assert "2 episodes" in capsys.readouterr().out.splitlines()[-1]
    assert main([*arguments, "--num_episodes=3"]) == 0
    assert len(rows(root)) == 3
    check_same(rows(root)[:2], first)


# -- successes and failures --------------------------------------------------------------------------------------


def collect_walks(root: Path, task: WalkTask, count: int = 6, only_successful: bool = False, n_envs: int = 3) -> None:
    features = frame_features(task.state_vectors, task.simulator(0).observation, 1, 64)
    with LeRobotDatasetWriter(root, task.fps, features) as writer:
        episodes = Collection(root, {})
        collect(NoisyPolicy(0.15), task, writer, episodes, range(count), n_envs=n_envs, only_successful=only_successful)


def test_only_successful_episodes(root: Path, tmp_path: Path) -> None:
    task = WalkTask(max_steps=30)
    collect_walks(root, task)
    collect_walks(tmp_path / "successful", task, only_successful=True)
    everything, successful = rows(root), rows(tmp_path / "successful")
    solved = [episode for episode in everything if episode[-1]["next.success"]]
    assert 0 < len(successful) == len(solved) < len(everything) == 6
    for episode, other in zip(successful, solved, strict=True):
        assert [row["action"] for row in episode] == [row["action"] for row in other]
    record = outcomes(tmp_path / "successful")
    assert [episode["seed"] for episode in record] == list(range(6))
    assert [episode["kept"] for episode in record] == [episode["success"] for episode in record]
    before = (tmp_path / "successful" / "collection.json").read_bytes()
    collect_walks(tmp_path / "successful", task, only_successful=True)  # nothing to do
    assert (tmp_path / "successful" / "collection.json").read_bytes() == before


def test_no_successful_episode(arguments: list[str], root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert main([*arguments, "--num_episodes=3", "--only_successful"]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: none of the 3 rollouts solved the task, so that there is no data set")
    assert [path.name for path in root.iterdir()] == ["collection.json"]


def test_a_broken_episode_is_left_out(root: Path) -> None:
    with pytest.warns(RuntimeWarning, match="1 of 3 episodes failed"):
        collect_walks(root, WalkTask(max_steps=10, faults={1: "step"}))
    assert len(rows(root)) == 5
    record = outcomes(root)
    assert [episode["seed"] for episode in record if episode["kept"]] == [0, 2, 3, 4, 5]
    assert "the world ended" in record[1]["error"]
    assert not (root / ".staging").exists()


@pytest.mark.filterwarnings("ignore:1 of 3 episodes failed")
@pytest.mark.parametrize("seeds_without_space", [{4}, {3, 4, 5}])
def test_a_full_disk(root: Path, monkeypatch: pytest.MonkeyPatch, seeds_without_space: set[int]) -> None:
    """The batch before it is safe, and the episodes that found no space are rolled out again."""
    task = WalkTask(max_steps=10)
    add_frame = EpisodeRecorder.add_frame

    def add_frame_until_full(recorder: EpisodeRecorder, frame: dict[str, Any]) -> None:
        if int(recorder._directory.name) in seeds_without_space:
            raise OSError(errno.ENOSPC, "No space left on device")
        add_frame(recorder, frame)

    with monkeypatch.context() as patch:
        patch.setattr(EpisodeRecorder, "add_frame", add_frame_until_full)
        with pytest.raises(OSError, match="No space left"):
            collect_walks(root, task)
    assert len(rows(root)) == 3
    collect_walks(root, task)
    assert [episode["seed"] for episode in outcomes(root) if episode["kept"]] == list(range(6))
    assert len(rows(root)) == 6


def test_the_command_says_that_the_disk_is_full(
    arguments: list[str], root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--num_episodes=2"]) == 0

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LeRobotDatasetWriter, "commit", full)
    assert main([*arguments, "--num_episodes=4"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: the disk is full: {root} has 2 complete episodes")


# -- refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--num_episodes=0"], "--num_episodes 0"),
        (["--n_envs=0"], "--n_envs 0"),
        (["--seed=-1"], "--first_episode_seed -1"),
        (["--image_size=65"], "both sides even"),
        (["--cache_mode=threshold"], "without --use_bac"),
        (["--optimal_steps_dir=nowhere"], "without --use_bac"),
        (["--num_caches=3"], "num_caches=3 has no effect"),
        (["--use_bac", "--cache_mode=original"], "give one of them"),
        (["--use_bac", "--cache_mode=threshold", "--num_bu_blocks=1"], "num_bu_blocks=1 has no effect"),
        (["--use_bac"], "optimal_steps_dir"),
        (["--use_bac", "--optimal_steps_dir=nowhere"], "nowhere"),
        (["--device=warp:9"], "warp:9"),
        (["--checkpoint=missing.ckpt"], "missing.ckpt"),
    ],
)
def test_mistakes_are_one_line_on_stderr(
    arguments: list[str], root: Path, wrong: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, *wrong]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not root.exists()


def test_a_directory_that_is_something_else(
    arguments: list[str], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root.mkdir()
    (root / "notes.txt").write_text("mine")
    assert main([*arguments, "--num_episodes=2"]) == 2
    assert "not empty, and not a data set of this command" in capsys.readouterr().err
    assert [path.name for path in root.iterdir()] == ["notes.txt"]
    shutil.rmtree(root)
    commit(root, [frames(3, 0)])
    assert main([*arguments, "--num_episodes=2"]) == 2
    assert "not a data set of this command" in capsys.readouterr().err
    assert len(read_dataset(root)) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{\n "settings": {},\n "batches": [', "collection.json, line 3: this is no JSON"),
        ("[]", "is no record of a collection"),
        ('{"settings": {}}', "is no record of a collection"),
        ('{"settings": {}, "batches": [[{"seed": 1000}]]}', "is no record of a collection"),
        ('{"settings": [], "batches": []}', "is no record of a collection"),
    ],
)
def test_a_foreign_record(root: Path, content: str, message: str) -> None:
    root.mkdir()
    (root / "collection.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        Collection(root, {})
    assert (root / "collection.json").read_text() == content


def test_data_of_other_settings(
    arguments: list[str], root: Path, steps_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--num_episodes=2"]) == 0
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    for other, message in (
        (["--seed=3"], "seed 1000 instead of 3"),
        (["--image_size=96"], "image_size 64 instead of 96"),
        (bac(steps_dir), "cache original instead of optimal"),
    ):
        assert main([*arguments, "--num_episodes=4", *other]) == 2
        assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_a_data_set_that_something_else_changed(
    arguments: list[str], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--num_episodes=2"]) == 0
    record = collection(root)
    record["batches"] = []
    (root / "collection.json").write_text(json.dumps(record))
    assert main([*arguments, "--num_episodes=4"]) == 2
    assert "has 2 episodes, but collection.json tells of 0" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["pyarrow", "gym_pusht.envs"])
def test_missing_packages(
    arguments: list[str], root: Path, module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert main([*arguments, "--num_episodes=2"]) == 2
    assert "pip install 'bacinfer[" in capsys.readouterr().err
    assert not root.exists()


def test_a_task_that_is_not_simulated_here(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from tiny_policies import write_tiny_checkpoint

    target = "diffusion_policy.env_runner.kitchen_lowdim_runner.KitchenLowdimRunner"
    checkpoint = write_tiny_checkpoint(tmp_path / "kitchen.ckpt", f"task.env_runner._target_={target}")
    assert main([*arguments, f"--checkpoint={checkpoint}"]) == 2
    assert "KitchenLowdimRunner alone" in capsys.readouterr().err


def test_script_runs() -> None:
    result = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True)
    assert "--only_successful" in result.stdout
