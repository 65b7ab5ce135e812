"""Push-T here against Diffusion Policy's own environment and runner, where that package is installed."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
keypoints_env = pytest.importorskip("diffusion_policy.env.pusht.pusht_keypoints_env")
image_env = pytest.importorskip("diffusion_policy.env.pusht.pusht_image_env")
for runner in ("pusht_keypoints_runner", "pusht_image_runner"):
    pytest.importorskip(f"diffusion_policy.env_runner.{runner}")
pytest.importorskip("gym_pusht")

from bacinfer.tasks import PushTImageTask, PushTTask, RunnerTask, make_task  # noqa: E402
from bacinfer.tasks.pusht import KEYPOINTS  # noqa: E402

GOAL = np.array([256.0, 256.0])
MAX_STEPS = 44
FLOAT32 = {"rtol": 2e-7, "atol": 1e-6}  # observations are rounded to it
CONFIG = {
    "n_obs_steps": 2,
    "task": {
        "name": "pusht_lowdim",
        "env_runner": {
            "_target_": "diffusion_policy.env_runner.pusht_keypoints_runner.PushTKeypointsRunner",
            "n_train": 6,
            "n_test": 50,
            "legacy_test": True,
            "max_steps": MAX_STEPS,
            "n_obs_steps": 2,
            "n_action_steps": 8,
        },
    },
}

IMAGE_CONFIG = OmegaConf.merge(
    CONFIG,
    {
        "task": {
            "name": "pusht_image",
            "env_runner": {"_target_": "diffusion_policy.env_runner.pusht_image_runner.PushTImageRunner"},
        }
    },
)


class PushingPolicy:
    """Goes behind the block, then to the goal, in turns; with noise from torch's generator."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self) -> None:
        self.model = nn.Linear(1, 1)

    def reset(self) -> None:
        self.calls = 0

    def predict_action(self, obs_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        block = obs_dict["obs"][:, -1, :18].reshape(-1, 9, 2).mean(1)
        goal = torch.tensor(GOAL, dtype=block.dtype).expand_as(block)
        self.calls += 1
        target = block + 130 * nn.functional.normalize(block - goal) if self.calls % 4 in (1, 2) else goal
        return {"action": target[:, None] + 5 * torch.randn(len(block), 8, 2)}


class SeeingPolicy(PushingPolicy):
    """Goes to where the picture's dark pixels are, with noise."""

    def predict_action(self, obs_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        dark = (obs_dict["image"][:, -1].amax(1) < 0.75).to(torch.float64)
        pixels = torch.linspace(0, 512, 96, dtype=torch.float64)
        weight = dark.sum((1, 2)).clamp(min=1)
        x, y = (dark.sum(1) * pixels).sum(1) / weight, (dark.sum(2) * pixels).sum(1) / weight
        target = torch.stack([x, y], dim=-1) - 0.1 * obs_dict["agent_pos"][:, -1].double()
        return {"action": target[:, None] + 5 * torch.randn(len(target), 8, 2)}


class PusherOfThisProject(PushingPolicy):
    """(Diffusion Policy's runner resets a policy before a rollout.)"""

    def __init__(self) -> None:
        super().__init__()
        self.reset()


@pytest.fixture(scope="module")
def parameters() -> dict[str, Any]:
    return keypoints_env.PushTKeypointsEnv.genenerate_keypoint_manager_params()


def test_keypoints(parameters: dict[str, Any]) -> None:
    np.testing.assert_allclose(KEYPOINTS, parameters["local_keypoint_map"]["block"], atol=1e-8, rtol=0)


@pytest.mark.parametrize("seed", [100_000, 100_001, 100_002, 100_049, 0, 11])
def test_an_episode_of_actions(parameters: dict[str, Any], seed: int) -> None:
    env = keypoints_env.PushTKeypointsEnv(legacy=True, **parameters)
    env.seed(seed)
    expected = env.reset()[:20]
    episode = PushTTask(n_obs_steps=1).episode(seed)
    np.testing.assert_allclose(episode.observation["obs"][0], expected, **FLOAT32)
    rewards = []
    for step in range(120):
        block = expected[:18].reshape(9, 2).mean(0)
        away = (block - GOAL) / np.linalg.norm(block - GOAL)
        action = (block + 130 * away if step % 40 < 20 else GOAL).astype(np.float32)
        expected, reward, _, _ = env.step(action)
        expected = expected[:20]
        rewards.append(reward)
        episode.execute(action[None])
        np.testing.assert_allclose(episode.observation["obs"][0], expected, **FLOAT32)
    assert max(rewards) > 0.1
    np.testing.assert_allclose(episode.rewards, rewards, atol=1e-9)


def test_a_rollout_of_the_runner() -> None:
    seeds = range(100_000, 100_004)
    task = make_task(OmegaConf.create(CONFIG))
    assert isinstance(task, RunnerTask)
    theirs = task.rollout(PushingPolicy(), seeds)
    ours = PushTTask(max_steps=MAX_STEPS).rollout(PusherOfThisProject(), seeds)
    assert dict(ours.log) == pytest.approx(dict(theirs.log), abs=1e-9)
    assert max(theirs.scores.values()) > 0.3
    assert len(ours.policy_seconds) == len(theirs.policy_seconds)


@pytest.mark.parametrize("demo_idx", [11, 100_003])
def test_observations_of_the_runner(demo_idx: int) -> None:
    policy = PushingPolicy()
    theirs = list(make_task(OmegaConf.create(CONFIG)).observations(policy, demo_idx, 4))
    ours = list(PushTTask().observations(PusherOfThisProject(), demo_idx, 4))
    assert len(theirs) == 4
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a["obs"], b["obs"], **FLOAT32)


@pytest.mark.parametrize("seed", [100_000, 100_002, 100_049, 11])
def test_pictures_of_an_episode(seed: int) -> None:
    env = image_env.PushTImageEnv(legacy=True)
    env.seed(seed)
    expected = env.reset()
    episode = PushTImageTask(n_obs_steps=1).episode(seed)
    pictures, rewards = [], []
    for step in range(60):
        observed = {name: values[0] for name, values in episode.observation.items()}
        np.testing.assert_allclose(observed["agent_pos"], expected["agent_pos"], **FLOAT32)
        np.testing.assert_array_equal(observed["image"], expected["image"])
        pictures.append(observed["image"])
        block = np.array(env.block.position)
        away = (block - GOAL) / np.linalg.norm(block - GOAL)
        action = (block + 130 * away if step % 40 < 20 else GOAL).astype(np.float32)
        expected, reward, _, _ = env.step(action)
        rewards.append(reward)
        episode.execute(action[None])
    np.testing.assert_allclose(episode.rewards, rewards, atol=1e-9)
    assert np.mean(pictures[0] != pictures[-1]) > 0.01


def test_a_rollout_of_the_image_runner() -> None:
    seeds = range(100_000, 100_003)
    task = make_task(IMAGE_CONFIG)
    assert isinstance(task, RunnerTask)
    theirs = task.rollout(SeeingPolicy(), seeds)
    ours = PushTImageTask(max_steps=MAX_STEPS).rollout(SeeingPolicy(), seeds)
    assert dict(ours.log) == pytest.approx(dict(theirs.log), abs=1e-9)
    assert max(theirs.scores.values()) > 0.1


def test_observations_of_the_image_runner() -> None:
    theirs = list(make_task(IMAGE_CONFIG).observations(SeeingPolicy(), 11, 3))
    ours = list(PushTImageTask().observations(SeeingPolicy(), 11, 3))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a["agent_pos"], b["agent_pos"], **FLOAT32)
        torch.testing.assert_close(a["image"], b["image"], rtol=0, atol=0)
