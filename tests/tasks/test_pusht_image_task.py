"""Push-T for policies that see: what they observe, and rollouts of a tiny one, whatever the simulator observes."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bacinfer.tasks import PushTImageTask
from bacinfer.tasks.episodes import State
from bacinfer.tasks.pusht import PushTImageSimulator, initial_state
from bacinfer.tasks.video import Frame, read_video
from tiny_image_policies import image_policy

SEED = 100_003
TOWARDS_THE_BLOCK = np.linspace([300.0, 260.0], [360.0, 420.0], 8)


@pytest.fixture
def policy() -> Any:
    return image_policy("pusht", "policy.crop_shape=[32,32]", "policy.num_inference_steps=2")


def test_an_observation_is_the_environment_s_own_of_pixels() -> None:
    from gym_pusht.envs import PushTEnv

    env = PushTEnv(obs_type="pixels_agent_pos")
    first, _ = env.reset(options={"reset_to_state": initial_state(SEED)})
    episode, history = PushTImageTask().episode(SEED), [first, first]
    for actions in (TOWARDS_THE_BLOCK[:0], TOWARDS_THE_BLOCK[:3], TOWARDS_THE_BLOCK[3:]):
        episode.execute(actions)
        history += [env.step(action)[0] for action in actions]
        observed = episode.observation
        assert {name: values.dtype for name, values in observed.items()} == {"image": "float32", "agent_pos": "float32"}
        for image, position, expected in zip(observed["image"], observed["agent_pos"], history[-2:], strict=True):
            np.testing.assert_array_equal(image, expected["pixels"].transpose(2, 0, 1) / np.float32(255))
            np.testing.assert_array_equal(position, np.float32(expected["agent_pos"]))
    block = [np.all(obs["pixels"] < 200, axis=-1) for obs in (first, history[-1])]
    assert np.sum(block[0] != block[1]) > 100  # it was pushed


@pytest.mark.parametrize(("recorded", "drawn"), [(False, 2), (True, 8)])
def test_only_what_is_seen_is_drawn(monkeypatch: pytest.MonkeyPatch, recorded: bool, drawn: int) -> None:
    states: list[State] = []
    recordings = [lambda seed: nullcontext(states.append)] if recorded else []
    episode = PushTImageTask().episode(SEED, recordings)
    pictures: list[int] = []
    camera = PushTImageSimulator.camera

    def counted(self: PushTImageSimulator, size: int) -> Frame:
        pictures.append(size)
        return camera(self, size)

    monkeypatch.setattr(PushTImageSimulator, "camera", counted)
    episode.execute(TOWARDS_THE_BLOCK)
    assert len(pictures) == drawn
    assert len(states) == (9 if recorded else 0)
    if recorded:
        np.testing.assert_array_equal(states[-1].observation["image"], episode.observation["image"][-1])


class Watched:
    """Keeps what the policy is given, and its actions."""

    def __init__(self, policy: Any) -> None:
        self.policy, self.model = policy, policy.model
        self.seen: list[dict[str, Tensor]] = []
        self.actions: list[Tensor] = []

    def predict_action(self, obs_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        self.seen.append(obs_dict)
        result = self.policy.predict_action(obs_dict)
        self.actions.append(result["action"])
        return result


@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_batch_of_episodes_sees_what_each_of_them_sees(policy: Any, n_workers: int, tmp_path: Path) -> None:
    task, watched, seeds = PushTImageTask(max_steps=16), Watched(policy), [SEED, SEED + 1, SEED + 2]
    rollout = task.rollout(watched, seeds, video_dir=tmp_path, video_seeds=[SEED], n_workers=n_workers)
    assert rollout.num_steps == dict.fromkeys(seeds, 16)
    assert len(list(read_video(rollout.videos[SEED]))) == 17
    first, second = watched.seen
    assert [first[name].shape for name in ("image", "agent_pos")] == [(3, 2, 3, 96, 96), (3, 2, 2)]
    for i, seed in enumerate(seeds):
        episode = task.episode(seed)
        for seen in (first, second):
            for name, values in episode.observation.items():
                np.testing.assert_array_equal(seen[name][i], values)
            episode.execute(watched.actions[0][i].numpy())


def test_observations_of_a_training_start(policy: Any) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    observations = list(PushTImageTask().observations(policy, 11, count=3))
    assert torch.equal(torch.get_rng_state(), state)
    assert [obs["image"].shape for obs in observations] == [(1, 2, 3, 96, 96)] * 3
    np.testing.assert_array_equal(observations[0]["image"][0], PushTImageTask().episode(11).observation["image"])
    assert not torch.equal(observations[0]["agent_pos"], observations[1]["agent_pos"])
