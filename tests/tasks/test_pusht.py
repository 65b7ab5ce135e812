"""Push-T: observations and initial states against recorded ones, and the bookkeeping of episodes."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bacinfer.tasks import pusht
from bacinfer.tasks.pusht import KEYPOINTS, PushTTask, initial_state, observation
from bacinfer.tasks.video import read_video


def numbers(text: str) -> np.ndarray:
    return np.array(text.split(), dtype=float)


# Steps 1000, 12345 and 25000 of the human demonstrations that Diffusion Policy published: state, then keypoints.
DEMONSTRATION_STEPS = [
    numbers(text)
    for text in (
        """
        84.805732727 150.067749023 143.303863525 271.900085449 2.853264093
        108.81356 188.21182 202.10742 255.69716 85.30176 290.55649 136.29987 247.33397 121.86549 150.15465
        96.56813 251.48946 172.3138 229.15704 141.55855 206.84787 121.21766 280.22421
        """,
        """
        263.843505859 320.994659424 319.406646729 291.546875 0.310552061
        300.7179 380.11343 261.70297 271.78131 377.83142 308.83414 311.34335 315.78595 268.48392 404.18982
        346.50299 334.75116 271.35034 310.4978 284.17709 346.26175 342.34158 297.12183
        """,
        """
        161.618087769 307.422332764 271.509643555 250.375274658 0.65845418
        223.74586 327.26434 224.00159 212.12117 320.54053 286.54541 255.66568 270.41321 185.23474
        338.90887 282.25314 300.22906 219.87154 251.80719 219.73695 289.80148 291.16989 263.43536
        """,
    )
]

# What Diffusion Policy's PushTKeypointsEnv(legacy=True) observes after a reset with these seeds.
FIRST_OBSERVATIONS = {
    100000: numbers(
        """
        376.145678077 193.53415246 261.007572522 192.42469005 336.14557817 96.440247605 319.532787958
        161.193685917 387.504350683 232.130553958 349.544956666 134.8280145 300.66188367 196.848886857
        338.654137384 197.265180918 312.818376839 125.638698288 235 124
        """
    ),
    7: numbers(
        """
        105.576368314 170.318579993 195.003301586 242.850213528 76.451705351 271.20955263 129.757652085
        230.867656114 120.708885578 133.03978477 89.857125411 232.823895098 166.71992843 214.706142876
        137.242867149 190.733502193 112.883127156 262.875325044 225 246
        """
    ),
}


class ScriptedPolicy:
    """Pushes the block about, with noise from torch's generator."""

    n_action_steps = 8

    def __init__(self) -> None:
        self.model = nn.Linear(1, 1)
        self.batch_sizes: list[int] = []

    def predict_action(self, obs_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        obs = obs_dict["obs"]
        self.batch_sizes.append(len(obs))
        block = obs[:, -1, :18].reshape(-1, 9, 2).mean(1)
        return {"action": block[:, None] + 60 * torch.randn(len(obs), 8, 2)}


class FakeEnv:
    """Rewards are a list, read one a step; 1 ends the episode."""

    rewards: tuple[float, ...] = ()

    def __init__(self) -> None:
        self.steps = 0

    def reset(self, options: dict[str, Any]) -> tuple[np.ndarray, dict]:
        return np.asarray(options["reset_to_state"]), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        reward = self.rewards[self.steps]
        self.steps += 1
        return np.array([*action, 200.0, 200.0, 0.0]), reward, reward == 1, False, {}


def test_keypoints_of_the_demonstrations() -> None:
    for step in DEMONSTRATION_STEPS:
        state, keypoints = step[:5], step[5:]
        observed = observation(state)
        np.testing.assert_allclose(observed[:18], keypoints, atol=3e-5, rtol=0)
        np.testing.assert_array_equal(observed[18:], state[:2])


@given(st.floats(-100, 600), st.floats(-100, 600), st.floats(-20, 20))
def test_keypoints_move_rigidly_with_the_block(x: float, y: float, angle: float) -> None:
    keypoints = observation(np.array([0.0, 0.0, x, y, angle]))[:18].reshape(9, 2)
    distances = np.linalg.norm(keypoints - [x, y], axis=1)
    np.testing.assert_allclose(distances, np.linalg.norm(KEYPOINTS, axis=1), atol=1e-9)


def test_observation_of_a_batch() -> None:
    states = np.random.default_rng(0).uniform(0, 500, (4, 3, 5))
    batch = observation(states)
    assert batch.shape == (4, 3, 20)
    np.testing.assert_array_equal(batch[2, 1], observation(states[2, 1]))


def test_initial_state_is_in_the_documented_ranges() -> None:
    states = np.array([initial_state(seed) for seed in range(200)])
    assert states[:, :2].min() >= 50
    assert states[:, :2].max() < 450
    assert states[:, 2:4].min() >= 100
    assert states[:, 2:4].max() < 400
    assert len(np.unique(states, axis=0)) == 200


@pytest.mark.parametrize("seed", FIRST_OBSERVATIONS)
def test_first_observation_is_that_of_diffusion_policy(seed: int) -> None:
    episode = PushTTask(n_obs_steps=2).episode(seed)
    assert episode.observation["obs"].shape == (2, 20)
    np.testing.assert_allclose(episode.observation["obs"], [FIRST_OBSERVATIONS[seed]] * 2, atol=3e-5, rtol=0)


def test_history_holds_the_last_observations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEnv, "rewards", (0.1, 0.2, 0.3))
    monkeypatch.setattr(pusht, "make_env", FakeEnv)
    episode = PushTTask(n_obs_steps=2).episode(5)
    first = episode.observation["obs"][0]
    episode.execute(np.array([[1.0, 2.0]]))
    np.testing.assert_array_equal(episode.observation["obs"][0], first)
    np.testing.assert_array_equal(episode.observation["obs"][1, 18:], [1, 2])
    episode.execute(np.array([[3.0, 4.0], [5.0, 6.0]]))
    np.testing.assert_array_equal(episode.observation["obs"][:, 18:], [[3, 4], [5, 6]])


def test_score_is_the_highest_reward_and_the_episode_ends_once_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pusht, "make_env", FakeEnv)
    monkeypatch.setattr(FakeEnv, "rewards", (0.1, 0.7, 0.2) + (0.0,) * 20)
    unsolved = PushTTask(max_steps=20).rollout(ScriptedPolicy(), [100_000])
    assert unsolved.scores == {100_000: 0.7}
    assert unsolved.num_steps == {100_000: 20}  # stops within the third chunk of 8
    assert len(unsolved.policy_seconds) == 3

    monkeypatch.setattr(FakeEnv, "rewards", (0.5,) * 9 + (1.0,) + (0.3,) * 20)
    solved = PushTTask(max_steps=20).rollout(ScriptedPolicy(), [100_000])
    assert solved.scores == {100_000: 1.0}
    assert solved.num_steps == {100_000: 10}
    assert len(solved.policy_seconds) == 2


def test_log_separates_training_from_test_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pusht, "make_env", FakeEnv)
    monkeypatch.setattr(FakeEnv, "rewards", (0.25,) * 8)
    rollout = PushTTask(max_steps=8).rollout(ScriptedPolicy(), [9_999, 10_000, 10_001])
    assert rollout.log == {
        "train/sim_max_reward_9999": 0.25,
        "train/mean_score": 0.25,
        "test/sim_max_reward_10000": 0.25,
        "test/sim_max_reward_10001": 0.25,
        "test/mean_score": 0.25,
    }
    assert rollout.mean_score == 0.25


def test_batches_keep_their_composition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pusht, "make_env", FakeEnv)
    monkeypatch.setattr(FakeEnv, "rewards", (0.25,) * 16)
    policy = ScriptedPolicy()
    PushTTask(max_steps=16).rollout(policy, range(5), n_envs=3)
    assert policy.batch_sizes == [3, 3, 2, 2]


def test_reward_is_coverage_over_its_threshold() -> None:
    env = pusht.make_env()
    for seed in (100_000, 100_001, 7):
        env.reset(options={"reset_to_state": initial_state(seed)})
        env.block.angle, env.block.position = np.pi / 4 + 0.1, (250.0, 262.0)
        _, reward, solved, _, info = env.step(np.array([20.0, 20.0]))
        assert 0.3 < info["coverage"] < 0.95
        assert reward == pytest.approx(info["coverage"] / 0.95)
        assert not solved
    env.block.angle, env.block.position = np.pi / 4, (256.0, 256.0)
    _, reward, solved, _, _ = env.step(np.array([20.0, 20.0]))
    assert reward == 1
    assert solved


def test_rollouts_repeat_and_leave_the_random_state() -> None:
    task, policy, seeds = PushTTask(max_steps=100), ScriptedPolicy(), [100_001, 100_002]
    state = torch.get_rng_state()
    first = task.rollout(policy, seeds)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    second = task.rollout(policy, seeds)
    # the simulation repeats exactly, the polygon area of the coverage up to rounding
    assert second.scores == pytest.approx(first.scores, abs=1e-12)
    assert max(first.scores.values()) > 0
    other_noise = task.rollout(policy, seeds, noise_seed=1)
    assert other_noise.scores != pytest.approx(first.scores, abs=1e-3)


def test_a_batch_does_not_depend_on_the_ones_before_it() -> None:
    task, policy = PushTTask(max_steps=100), ScriptedPolicy()
    both = task.rollout(policy, [3, 4, 100_001, 100_002], n_envs=2)
    second = task.rollout(policy, [100_001, 100_002], n_envs=2)
    assert second.scores == pytest.approx({seed: both.scores[seed] for seed in second.scores}, abs=1e-12)
    assert max(second.scores.values()) > 0


def test_observations_are_those_of_the_rollout() -> None:
    class Recorder(ScriptedPolicy):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Tensor] = []

        def predict_action(self, obs_dict: dict[str, Tensor]) -> dict[str, Tensor]:
            self.seen.append(obs_dict["obs"])
            return super().predict_action(obs_dict)

    task = PushTTask(max_steps=40)
    recorder = Recorder()
    task.rollout(recorder, [11])
    observations = list(task.observations(ScriptedPolicy(), 11, count=3))
    assert [obs["obs"].shape for obs in observations] == [(1, 2, 20)] * 3
    for obs, seen in zip(observations, recorder.seen, strict=False):
        assert torch.equal(obs["obs"], seen)
    assert len(list(task.observations(ScriptedPolicy(), 11, count=100))) == 5  # the episode has 40 steps


def test_video_has_a_frame_for_every_state(tmp_path: Any) -> None:
    rollout = PushTTask(max_steps=12).rollout(
        ScriptedPolicy(), [100_000, 100_001], video_dir=tmp_path, video_seeds=[100_001]
    )
    assert list(rollout.videos) == [100_001]
    frames = list(read_video(rollout.videos[100_001]))
    assert len(frames) == rollout.num_steps[100_001] + 1
    assert {frame.shape for frame in frames} == {(384, 384, 3)}
    assert np.abs(frames[0].astype(int) - frames[-1].astype(int)).max() > 100  # something moved
    assert [path.name for path in tmp_path.iterdir()] == ["100001.mp4"]


@pytest.mark.parametrize("seeds", [[], [1, 1], [-1]])
def test_bad_seeds(seeds: list[int]) -> None:
    with pytest.raises(ValueError, match="seeds"):
        PushTTask().rollout(ScriptedPolicy(), seeds)


def test_videos_have_to_be_of_the_seeds_and_go_somewhere(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="video"):
        PushTTask().rollout(ScriptedPolicy(), [1], video_dir=tmp_path, video_seeds=[2])
    with pytest.raises(ValueError, match="video_dir"):
        PushTTask().rollout(ScriptedPolicy(), [1], video_seeds=[1])


def test_no_observations_asked_for() -> None:
    with pytest.raises(ValueError, match="count = 0"):
        PushTTask().observations(ScriptedPolicy(), 1, count=0)


def test_actions_that_are_not_finite() -> None:
    episode = PushTTask().episode(1)
    with pytest.raises(RuntimeError, match="not finite"):
        episode.execute(np.full((8, 2), np.nan))


def test_missing_simulator_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gym_pusht.envs", None)
    with pytest.raises(RuntimeError, match=r"bacinfer\[sim\]"):
        PushTTask().rollout(ScriptedPolicy(), [1])


def test_the_camera_does_not_see_the_action() -> None:
    """Films show it, as a red cross."""
    simulator = PushTTask().simulator(7)
    simulator.step(np.array([250.0, 60.0]))
    film, seen = simulator.render(), simulator.camera(96)
    assert (film.shape, seen.shape) == ((384, 384, 3), (96, 96, 3))
    assert redness(film) > 200
    assert redness(seen) < 20


def redness(picture: np.ndarray) -> int:
    """How much more red than anything else the reddest pixel is."""
    return int((picture[..., 0].astype(int) - picture[..., 1:].max(axis=-1)).max())
