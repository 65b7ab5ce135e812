"""The task table, and from a checkpoint's configuration to its task; runners are stood in for by a fake one."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

import stand_in_runner
from bacinfer.tasks import (
    TASKS,
    MetaWorldTask,
    PushTImageTask,
    PushTTask,
    RunnerTask,
    check_disturbable,
    make_task,
    task_name,
)
from bacinfer.tasks.table import tasks_in_group, tasks_named
from bacinfer.tasks.video import frame_rate
from stand_in_runner import FPS, STAND_IN_RUNNER, StandInRunner

IMAGE_RUNNER = "diffusion_policy.env_runner.pusht_image_runner.PushTImageRunner"
PUSHT_RUNNER = "diffusion_policy.env_runner.pusht_keypoints_runner.PushTKeypointsRunner"


class CountingPolicy:
    def __init__(self) -> None:
        self.model = nn.Linear(1, 1)
        self.device = torch.device("cpu")
        self.noise: list[float] = []

    def reset(self) -> None:
        pass

    def predict_action(self, obs_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        self.noise.append(torch.rand(1).item())
        return {"action": obs_dict["obs"][:, :1] + 1}


@pytest.fixture(autouse=True)
def _fake_package(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = stand_in_runner.install(monkeypatch)
    module.Path = Path
    monkeypatch.setitem(sys.modules, "diffusion_policy", ModuleType("diffusion_policy"))
    monkeypatch.setitem(sys.modules, "diffusion_policy.env_runner", ModuleType("diffusion_policy.env_runner"))
    for runner in (PUSHT_RUNNER, IMAGE_RUNNER):
        monkeypatch.setitem(sys.modules, runner.rpartition(".")[0], None)  # cannot be imported


def config(target: str | None = STAND_IN_RUNNER, name: str = "kitchen_lowdim", **settings: Any) -> DictConfig:
    runner = {"_target_": target, **settings} if target else None
    return OmegaConf.create({"n_obs_steps": 2, "task": {"name": name, "env_runner": runner}})


def test_table_holds_the_benchmark() -> None:
    assert [info.name for info in tasks_in_group("mh")] == ["lift_mh", "can_mh", "square_mh", "transport_mh"]
    assert {info.name for info in tasks_in_group("lowdim")} == {"block_pushing", "kitchen"}
    assert [TASKS["kitchen"].row_name(metric) for metric in TASKS["kitchen"].metrics] == [
        f"kitchen_p_{i}" for i in (1, 2, 3, 4)
    ]
    assert TASKS["pusht"].row_name("mean_score") == "pusht"
    assert TASKS["pusht"].group == "ph"
    assert [info.name for info in tasks_in_group("arm")] == ["drawer_open", "pick_place"]
    assert [info.name for info in tasks_in_group("image")] == ["pusht_image"]


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"unknown task lift, can: expected some of lift_ph"):
        tasks_named(["lift", "pusht", "can"])
    with pytest.raises(ValueError, match="unknown task group"):
        tasks_in_group("camera")


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ({"name": "can_lowdim", "task_name": "can", "dataset_type": "mh"}, "can_mh"),
        ({"name": "blockpush_lowdim_seed"}, "block_pushing"),
        ({"name": "kitchen_lowdim_abs"}, "kitchen"),
        ({"name": "pusht_lowdim"}, "pusht"),
        ({"name": "my_task"}, "my_task"),
    ],
)
def test_task_names(task: dict[str, str], name: str) -> None:
    assert task_name(OmegaConf.create({"task": task})) == name


def test_pusht_without_diffusion_policy() -> None:
    task = make_task(config(PUSHT_RUNNER, "pusht_lowdim", max_steps=77, legacy_test=True, n_latency_steps=0))
    assert isinstance(task, PushTTask)
    assert (task.name, task.n_obs_steps, task.max_steps) == ("pusht", 2, 77)


def test_pusht_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="legacy_test"):
        make_task(config(PUSHT_RUNNER, "pusht_lowdim", legacy_test=False))


def test_pusht_on_pictures_without_diffusion_policy() -> None:
    task = make_task(config(IMAGE_RUNNER, "pusht_image", max_steps=77, legacy_test=True, render_size=96))
    assert isinstance(task, PushTImageTask)
    assert (task.name, task.n_obs_steps, task.max_steps) == ("pusht_image", 2, 77)
    assert TASKS[task.name].group == "image"


def test_pusht_on_pictures_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'render_size': 96.*'render_size': 128"):
        make_task(config(IMAGE_RUNNER, "pusht_image", render_size=128))


def test_robot_arm() -> None:
    target = "bacinfer.tasks.metaworld.MetaWorldTask"
    task = make_task(config(target, "pick_place", env_name="pick-place-v3", max_steps=77))
    assert isinstance(task, MetaWorldTask)
    assert (task.name, task.env_name, task.n_obs_steps, task.max_steps) == ("pick_place", "pick-place-v3", 2, 77)


def test_runner_rollout(tmp_path: Path) -> None:
    task = make_task(config(max_steps=4, n_envs=28))
    policy = CountingPolicy()
    rollout = task.rollout(policy, range(100_000, 100_003), video_dir=tmp_path / "media", video_seeds=[100_000])
    assert rollout.scores == {100_000: 0.5, 100_001: 0.5, 100_002: 0.5}
    assert rollout.mean_score == 0.5
    assert rollout.log["test/p1"] == 0.75
    assert len(rollout.policy_seconds) == 4
    assert rollout.videos == {100_000: tmp_path / "media" / "100000.mp4"}
    assert rollout.log["test/sim_video_100000"] == str(rollout.videos[100_000])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [rollout.videos[100_000]]
    assert frame_rate(rollout.videos[100_000]) == FPS
    (runner,) = StandInRunner.closed
    assert (runner.settings.n_train, runner.settings.n_envs, runner.settings.n_test_vis) == (0, 3, 1)

    again = CountingPolicy()
    torch.manual_seed(99)
    task.rollout(again, range(100_000, 100_003), n_envs=2)
    assert again.noise == policy.noise
    assert StandInRunner.closed[-1].settings.n_envs == 2


def test_a_runner_cannot_be_disturbed() -> None:
    with pytest.raises(ValueError, match="task kitchen cannot be disturbed: its RunnerTask"):
        check_disturbable(make_task(config()))
    check_disturbable(make_task(config(PUSHT_RUNNER, "pusht_lowdim")))


def test_runner_rollout_of_training_starts() -> None:
    rollout = make_task(config()).rollout(CountingPolicy(), range(3, 5))
    assert rollout.scores == {3: 0.5, 4: 0.5}
    assert rollout.mean_score == 0.5
    assert "train/mean_score" in rollout.log
    (runner,) = StandInRunner.closed
    assert (runner.settings.n_train, runner.settings.n_test, runner.settings.train_start_idx) == (2, 0, 3)


def test_runner_observations_stop_after_their_count() -> None:
    task = make_task(config(max_steps=1_000))
    policy = CountingPolicy()
    observations = task.observations(policy, 7, count=3)
    assert [obs["obs"].tolist() for obs in observations] == [[[[7.0]]], [[[8.0]]], [[[9.0]]]]
    assert len(policy.noise) == 2
    (runner,) = StandInRunner.closed
    assert (runner.settings.n_train, runner.settings.n_test, runner.settings.n_train_vis) == (1, 0, 0)
    assert next(task.observations(policy, 100_007))["obs"].item() == 100_007
    assert (StandInRunner.closed[1].settings.n_train, StandInRunner.closed[1].settings.n_test) == (0, 1)


def test_runner_has_contiguous_seeds_and_films_the_first() -> None:
    task = make_task(config())
    with pytest.raises(ValueError, match="contiguous"):
        task.rollout(CountingPolicy(), [100_000, 100_002])
    with pytest.raises(ValueError, match="contiguous"):
        task.rollout(CountingPolicy(), [9_999, 10_000])
    with pytest.raises(ValueError, match="first seeds"):
        task.rollout(CountingPolicy(), [100_000, 100_001], video_dir="x", video_seeds=[100_001])


def test_missing_data_are_said_to_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = f"cannot start StandInRunner of task kitchen: .*low_dim.hdf5.* the current directory, {tmp_path}: "
    with pytest.raises(RuntimeError, match=expected):
        make_task(config(max_steps=-1)).rollout(CountingPolicy(), [100_000])


@pytest.mark.parametrize(
    ("failure", "meaning"),
    [
        (
            AttributeError("module 'wandb.util' has no attribute 'generate_id'"),
            r'generate_id.*pip install "wandb<0\.28"',
        ),
        (AttributeError("'float' object has no attribute 'numerator'"), r'numerator.*pip install "av<13"'),
        (ConnectionResetError(104, "Connection reset by peer"), "the process of an environment ended"),
        (EOFError(), r"EOFError\(\).*the process of an environment ended"),
        (ValueError("gladLoadGL error"), "MUJOCO_GL=egl"),
        (KeyError("kettle"), "'kettle'$"),
    ],
)
def test_what_environments_fail_with_is_explained(
    failure: Exception, meaning: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StandInRunner, "failure", failure)
    task = make_task(config())
    with pytest.raises(RuntimeError, match=f"StandInRunner of task kitchen failed: .*{meaning}"):
        task.rollout(CountingPolicy(), [100_000])
    with pytest.raises(RuntimeError, match=meaning):
        task.observations(CountingPolicy(), 7, count=2)
    assert len(StandInRunner.closed) == 2


def test_a_failing_policy_does_not_leave_environments_open() -> None:
    class Broken(CountingPolicy):
        def predict_action(self, obs_dict: dict[str, Tensor]) -> dict[str, Tensor]:
            raise FloatingPointError("no actions today")

    with pytest.raises(FloatingPointError, match=r"^no actions today$"):
        make_task(config()).rollout(Broken(), [100_000])
    assert len(StandInRunner.closed) == 1


def test_missing_simulator() -> None:
    with pytest.raises(RuntimeError, match=r"kitchen needs diffusion_policy\.env_runner\.kitchen"):
        make_task(config("diffusion_policy.env_runner.kitchen_lowdim_runner.KitchenLowdimRunner"))
    with pytest.raises(RuntimeError, match="has no Missing"):
        make_task(config("diffusion_policy.env_runner.stand_in_runner.Missing"))


@pytest.mark.parametrize(
    "target", ["os.system", "subprocess.Popen", "diffusion_policy.env_runner.stand_in_runner.Path"]
)
def test_only_diffusion_policys_runners_are_called(target: str) -> None:
    with pytest.raises(ValueError, match="trust_checkpoint"):
        make_task(config(target))


def test_a_trusted_checkpoint_may_bring_its_own_runner() -> None:
    task = make_task(config("diffusion_policy.env_runner.stand_in_runner.Path"), trust_checkpoint=True)
    assert isinstance(task, RunnerTask)


def test_no_runner() -> None:
    with pytest.raises(ValueError, match="names no environment"):
        make_task(config(target=None))
