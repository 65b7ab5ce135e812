"""The demonstrations' frames against what gym-pusht itself observes, and drawing them only once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bacinfer.training import pusht_images
from bacinfer.training.pusht_images import ImageDemonstrations, draw_frames, read_pusht_images

STEPS = 12


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    """States and the environment's own pictures of an episode that pushes the block about."""
    from gym_pusht.envs import PushTEnv

    env = PushTEnv(obs_type="pixels_agent_pos")
    observation, _ = env.reset(seed=1)
    random = np.random.default_rng(0)
    states, frames, contacts = [], [], []
    for _ in range(STEPS):
        states.append([*env.agent.position, *env.block.position, env.block.angle % (2 * np.pi)])
        frames.append(observation["pixels"].transpose(2, 0, 1))
        observation, *_, info = env.step(np.array(env.block.position) + random.uniform(-60, 60, 2))
        contacts.append(info["n_contacts"])
    assert np.ptp([state[4] for state in states]) > 0.1  # the block was turned
    assert max(contacts) > 0  # and touched, which is drawn
    return {"state": np.array(states, np.float32), "frames": np.array(frames)}


@pytest.fixture
def path(recorded: dict[str, np.ndarray], tmp_path: Path) -> Path:
    action = np.arange(2.0 * STEPS).reshape(STEPS, 2)
    np.savez(tmp_path / "demos.npz", state=recorded["state"], action=action, episode_ends=np.array([7, STEPS]))
    return tmp_path / "demos.npz"


def test_frames_are_what_the_environment_observes(path: Path, recorded: dict[str, np.ndarray], tmp_path: Path) -> None:
    demonstrations = read_pusht_images(path, tmp_path / "frames", n_obs_steps=2)
    assert demonstrations.image.dtype == torch.uint8
    assert np.array_equal(demonstrations.image.numpy(), recorded["frames"])
    assert np.array_equal(demonstrations.agent_pos.numpy(), recorded["state"][:, :2])
    assert demonstrations.episode_ends == (7, STEPS)


def test_frames_are_drawn_once(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read_pusht_images(path, tmp_path / "frames", n_obs_steps=2)
    monkeypatch.setattr(pusht_images, "draw_state", lambda *_: pytest.fail("drawn again"))
    again = read_pusht_images(path, tmp_path / "frames", n_obs_steps=2)
    assert torch.equal(again.image, first.image)
    # other states have other frames
    with np.load(path) as arrays:
        np.savez(path, **{**arrays, "state": arrays["state"] + 1})
    with pytest.raises(pytest.fail.Exception, match="drawn again"):
        read_pusht_images(path, tmp_path / "frames", n_obs_steps=2)


@pytest.mark.parametrize("lost_bytes", [0, 1, 3 * 96 * 96 + 1])
def test_interrupted_drawing_goes_on(
    lost_bytes: int, recorded: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "frames" / "frames.npy"
    draw_state, drawn = pusht_images.draw_state, []

    def interrupted(env, state):  # type: ignore[no-untyped-def]
        if len(drawn) == 5:
            raise KeyboardInterrupt
        drawn.append(state)
        return draw_state(env, state)

    monkeypatch.setattr(pusht_images, "draw_state", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw_frames(recorded["state"], path)
    assert not path.exists()
    part = path.with_name("frames.npy.part")
    part.write_bytes(part.read_bytes()[: part.stat().st_size - lost_bytes])

    missing = []
    monkeypatch.setattr(pusht_images, "draw_state", lambda env, state: missing.append(1) or draw_state(env, state))
    draw_frames(recorded["state"], path)
    assert len(missing) == STEPS - 5 + -(-lost_bytes // (3 * 96 * 96))
    assert np.array_equal(np.load(path), recorded["frames"])
    assert not part.exists()


def test_a_batch() -> None:
    image = torch.arange(6, dtype=torch.uint8).reshape(6, 1, 1, 1).expand(6, 3, 96, 96)
    steps = torch.arange(12.0).reshape(6, 2)
    demonstrations = ImageDemonstrations(image, steps, 10 * steps, (6,), n_obs_steps=2, noise_draws=3)
    windows = torch.tensor([[0, 1, 2, 3], [2, 3, 4, 5]])
    batch = demonstrations.to("cpu").batch(windows)
    assert batch["obs"]["image"].shape == (2, 2, 3, 96, 96)
    torch.testing.assert_close(batch["obs"]["image"][:, :, 0, 0, 0], torch.tensor([[0, 1], [2, 3]]) / 255)
    assert torch.equal(batch["obs"]["agent_pos"], steps[windows[:, :2]])
    assert torch.equal(batch["action"], 10 * steps[windows[[0, 0, 0, 1, 1, 1]]])


def test_drawing_without_gym_pusht(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gym_pusht.envs", None)
    with pytest.raises(RuntimeError, match=r"pip install 'bacinfer\[sim\]'"):
        read_pusht_images(path, tmp_path / "frames", n_obs_steps=2)
    assert not (tmp_path / "frames").exists()
