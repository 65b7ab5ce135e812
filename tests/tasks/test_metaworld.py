"""The robot arm: initial states, observations, the experts' success, and pictures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bacinfer.tasks import metaworld
from bacinfer.tasks.metaworld import MetaWorldSimulator, MetaWorldTask, scripted_expert
from bacinfer.tasks.video import read_video

ENVIRONMENTS = ["assembly-v3", "drawer-open-v3", "pick-place-v3"]


def can_draw() -> bool:
    """Asked in another process: a broken OpenGL library can end it."""
    program = "from bacinfer.tasks.metaworld import MetaWorldSimulator as S; S('pick-place-v3', 0).render()"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0


class StillPolicy:
    """Holds the hand where it is."""

    def __init__(self) -> None:
        self.model = nn.Linear(1, 1)

    def predict_action(self, obs_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"action": torch.zeros(len(obs_dict["obs"]), 8, 4)}


@pytest.mark.parametrize("env_name", ENVIRONMENTS)
def test_a_seed_determines_the_initial_state(env_name: str) -> None:
    np.random.seed(5)  # noqa: NPY002
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    first = np.array([MetaWorldSimulator(env_name, seed).observation["obs"] for seed in range(8)])
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    np.random.seed(6)  # noqa: NPY002
    again = np.array([MetaWorldSimulator(env_name, seed).observation["obs"] for seed in reversed(range(8))])
    np.testing.assert_array_equal(first, again[::-1])
    assert len(np.unique(first[:, 4:], axis=0)) == 8


def test_the_observation_tells_where_things_are() -> None:
    simulator = MetaWorldSimulator("pick-place-v3", 3)
    hand, gripper, puck, goal = np.split(simulator.observation["obs"], [3, 4, 7])
    np.testing.assert_allclose(hand, [0, 0.6, 0.2], atol=0.02)
    assert gripper == pytest.approx(1.0, abs=0.05)
    puck, goal = puck + hand, goal + hand
    assert -0.1 <= puck[0] <= 0.1
    assert 0.6 <= puck[1] <= 0.7
    assert 0.8 <= goal[1] <= 0.9
    for _ in range(10):
        simulator.step(np.array([1.0, 0.0, 0.0, 1.0]))
    moved = simulator.observation["obs"]
    assert moved[0] - hand[0] > 0.03
    assert moved[3] < gripper - 0.1
    np.testing.assert_allclose(moved[4:7] + moved[:3], puck, atol=2e-3)  # it settles a little
    np.testing.assert_allclose(moved[7:] + moved[:3], goal, atol=1e-12)


@pytest.mark.parametrize("env_name", ENVIRONMENTS)
def test_the_expert_solves_the_task(env_name: str) -> None:
    for seed in (10_000, 10_001):
        simulator, expert = MetaWorldSimulator(env_name, seed), scripted_expert(env_name)
        results = []
        while len(results) < metaworld.MAX_STEPS and not (results and results[-1][1]):
            results.append(simulator.step(simulator.expert_action(expert)))
        assert results[-1] == (1.0, True)
        assert all(result == (0.0, False) for result in results[:-1])
        assert 30 < len(results) < 120


def test_actions_beyond_their_range_are_clipped() -> None:
    observations = []
    for size in (1.0, 7.0):
        simulator = MetaWorldSimulator("drawer-open-v3", 1)
        for _ in range(5):
            simulator.step(np.full(4, size))
        observations.append(simulator.observation["obs"])
    np.testing.assert_array_equal(*observations)


def test_a_policy_that_does_nothing_scores_nothing() -> None:
    rollout = MetaWorldTask("drawer_open", "drawer-open-v3", max_steps=20).rollout(StillPolicy(), [10_000, 10_001])
    assert rollout.scores == {10_000: 0.0, 10_001: 0.0}
    assert rollout.num_steps == {10_000: 20, 10_001: 20}


def test_video(tmp_path: Path) -> None:
    if not can_draw():
        pytest.skip("needs OpenGL without a display (Debian: apt-get install libegl1 libgl1)")
    task = MetaWorldTask("pick_place", "pick-place-v3", max_steps=8)
    rollout = task.rollout(StillPolicy(), [10_000], video_dir=tmp_path, video_seeds=[10_000])
    frames = list(read_video(rollout.videos[10_000]))
    assert {frame.shape for frame in frames} == {(384, 384, 3)}
    assert len(frames) == 9
    red, green, blue = np.moveaxis(frames[0][:192].astype(int), -1, 0)
    assert ((red > 100) & (green < 60) & (blue < 60)).mean() > 0.02  # the arm is up, the table is down
    assert "MUJOCO_GL" not in os.environ


def test_camera() -> None:
    if not can_draw():
        pytest.skip("needs OpenGL without a display (Debian: apt-get install libegl1 libgl1)")
    simulator = MetaWorldSimulator("pick-place-v3", 0)
    film, seen = simulator.render().astype(float), simulator.camera(96)
    np.testing.assert_allclose(seen, film.reshape(96, 4, 96, 4, 3).mean(axis=(1, 3)), atol=1)
    with pytest.raises(ValueError, match="pictures of 385 pixels asked for"):
        simulator.camera(385)


def test_no_opengl_is_said_clearly(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(env: object) -> None:
        raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")

    monkeypatch.setattr(metaworld, "_renderer", fail)
    with pytest.raises(RuntimeError, match=r"cannot draw here .*eglQueryString.*apt-get install libegl1"):
        MetaWorldSimulator("pick-place-v3", 0).render()


def test_unknown_environment() -> None:
    with pytest.raises(ValueError, match=r"no task 'fly-v3'; it has .*pick-place-v3"):
        MetaWorldSimulator("fly-v3", 0)


def test_missing_simulator_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "metaworld.env_dict", None)
    with pytest.raises(RuntimeError, match=r"bacinfer\[arm\]"):
        MetaWorldSimulator("pick-place-v3", 0)
