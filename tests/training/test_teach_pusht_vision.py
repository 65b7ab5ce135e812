"""The script that teaches the image policy to see: its scenes, how it is connected, and what comes out of it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from bacinfer.commands.train import main as train
from bacinfer.policies import load_policy
from bacinfer.tasks.pusht import observation
from bacinfer.training.configuration import read_config
from bacinfer.training.log import TrainingLog

ROOT = Path(__file__).parents[2]
STATE_POLICY = ROOT / "assets" / "pusht" / "pusht_transformer.ckpt"
TINY = ["policy.crop_shape=[32,32]", "policy.num_inference_steps=2", "dataloader.batch_size=4", "training.log_every=1"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("teach_pusht_vision", ROOT / "scripts" / "teach_pusht_vision.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its data classes look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def states() -> np.ndarray:
    return np.random.default_rng(0).uniform((50, 50, 150, 150, 0), (450, 450, 350, 350, 6), (30, 5)).astype(np.float32)


@pytest.fixture(scope="module")
def state_policy() -> Any:
    return load_policy(STATE_POLICY)


def test_scenes_are_moved_as_a_whole(script: ModuleType, states: np.ndarray) -> None:
    scenes = script.moved(states, 500)
    assert scenes.shape == (500, 5)
    assert np.array_equal(scenes, script.moved(states, 500))
    points = observation(scenes)
    assert script.BOARD[0] < points.min()
    assert points.max() < script.BOARD[1]

    # where the pusher is, as seen from the block, is as it was, but where it was put elsewhere
    def from_block(states: np.ndarray) -> np.ndarray:
        x, y = (states[:, :2] - states[:, 2:4]).T
        cos, sin = np.cos(states[:, 4]), np.sin(states[:, 4])
        return np.stack([cos * x + sin * y, cos * y - sin * x], axis=1)

    off = np.linalg.norm(from_block(scenes)[:, None] - from_block(states), axis=2).min(axis=1)
    assert 0.6 < (off < 0.01).mean() < 0.9
    assert np.ptp(scenes[:, 4] - states[:, 4].mean()) > 2


def test_the_image_policy_takes_what_it_sees_as_the_policy_of_states_does(
    script: ModuleType, state_policy: Any
) -> None:
    policy = script.make_policy(read_config([*script.SETTINGS, *TINY]), state_policy)
    seeing = script.Seeing(policy)
    seeing.connect(policy, state_policy.model.cond_obs_emb)
    features = torch.randn(5, 2, 66)
    seen = torch.cat([seeing.keypoints(features), features[..., -2:]], dim=-1)
    trajectory = torch.randn(5, 16, 2)
    torch.testing.assert_close(
        policy.model(trajectory, 50, features), state_policy.model(trajectory, 50, seen), rtol=1e-4, atol=1e-5
    )
    again = script.Seeing(policy)
    again.resume(policy, state_policy.model.cond_obs_emb)
    torch.testing.assert_close(again.keypoints(features), seeing.keypoints(features), rtol=1e-4, atol=1e-5)
    pixels = 512 * torch.rand(7, 20)
    for name, values, known in (
        ("agent_pos", pixels[:, -2:], state_policy.normalizer["obs"].normalize(pixels)[:, -2:]),
        ("action", pixels[:, :2], state_policy.normalizer["action"].normalize(pixels[:, :2])),
    ):
        torch.testing.assert_close(policy.normalizer[name].normalize(values), known, rtol=0, atol=1e-5)


def test_errors_are_pixels(script: ModuleType, state_policy: Any) -> None:
    seeing = script.Seeing(script.make_policy(read_config([*script.SETTINGS, *TINY]), state_policy)).eval()
    frames, position = torch.zeros(3, 3, 96, 96, dtype=torch.uint8), torch.full((3, 2), 256.0)
    scale = state_policy.normalizer["obs"].scale[:-2]
    with torch.no_grad():
        seen = seeing(frames, position)
    off = torch.tensor([3.0, 4.0]).repeat(9) * scale
    torch.testing.assert_close(
        script.errors(seeing, script.Scenes(frames, position, seen + off), scale), torch.full((3, 9), 5.0)
    )


class Colours(torch.nn.Module):
    """An encoder that sees but the mean of each colour."""

    output_dim = 5

    def forward(self, obs: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([obs["image"].mean((2, 3)), obs["agent_pos"]], dim=1)


def test_teaching_lets_features_give_the_keypoints(script: ModuleType, state_policy: Any, tmp_path: Path) -> None:
    cfg = read_config([*script.SETTINGS, "dataloader.batch_size=8", "optimizer.learning_rate=0.03"])
    policy = script.make_policy(cfg, state_policy)
    policy.obs_encoder = Colours()
    seeing = script.Seeing(policy)
    frames = torch.randint(256, (40, 3, 1, 1)).expand(-1, -1, 2, 2).to(torch.uint8)
    keypoints = (frames[:, :, 0, 0].float() / 128 - 1) @ torch.randn(3, 18)
    scenes = script.Scenes(frames, 512 * torch.rand(40, 2), keypoints)
    before = script.errors(seeing, scenes, torch.ones(18)).mean()
    log = TrainingLog(tmp_path / "log.jsonl")
    last = script.teach(seeing, scenes[:30], cfg, 2, log, step=1000)
    assert 1000 < log.entries[0]["global_step"] < last
    assert script.errors(seeing, scenes[30:], torch.ones(18)).mean() < before / 20


def test_what_is_taught_can_be_trained(script: ModuleType, states: np.ndarray, tmp_path: Path, capsys: Any) -> None:
    data, out = tmp_path / "demos.npz", tmp_path / "seeing.ckpt"
    np.savez(data, state=states[:12], action=states[:12, :2], episode_ends=np.array([12]))
    settings = [*TINY, f"training.frames_dir={tmp_path / 'frames'}"]
    assert script.main(["--data", str(data), "--out", str(out), "--scenes", "50", "--seconds", "1", *settings]) == 0
    assert "keypoints of 1 other scenes" in capsys.readouterr().out
    assert len(list((tmp_path / "frames").glob("*.npy"))) == 2
    before = load_policy(out)
    obs = {"image": torch.rand(1, 2, 3, 96, 96), "agent_pos": torch.full((1, 2, 2), 250.0)}
    assert before.predict_action(obs)["action"].shape == (1, 8, 2)

    on = tmp_path / "seeing_on.ckpt"
    options = ["--init_from", str(out), "--scenes", "50", "--seconds", "0.01", *settings]  # one step, hardly
    assert script.main(["--data", str(data), "--out", str(on), *options]) == 0
    for name, value in load_policy(on).state_dict().items():
        torch.testing.assert_close(value, before.state_dict()[name], rtol=1e-2, atol=1e-2)

    settings = [*settings, "task=pusht_image", "horizon=16", "training.num_epochs=1", "optimizer.learning_rate=1e-5"]
    run = tmp_path / "run"
    assert train(["-o", str(run), "--data", str(data), "--init_from", str(out), *settings]) == 0
    after = load_policy(run / "checkpoints" / "latest.ckpt").state_dict()
    for name, value in before.state_dict().items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--state_policy", "nowhere.ckpt"], "no checkpoint at nowhere.ckpt"),
        (["--init_from", "nowhere.ckpt"], "no checkpoint at nowhere.ckpt"),
        ([], "no demonstrations at nowhere.npz"),
        (["--scenes", "49"], "--scenes 49: expected at least 50"),
        (["--seconds", "0"], "--seconds 0: expected a time above 0"),
        (["training.devise=cpu"], "training.devise"),
    ],
)
def test_a_mistake_is_a_sentence(
    script: ModuleType, tmp_path: Path, capsys: Any, options: list[str], error: str
) -> None:
    arguments = ["--data", "nowhere.npz", "--out", str(tmp_path / "seeing.ckpt"), "--state_policy", str(STATE_POLICY)]
    assert script.main([*arguments, *options]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert error in message
    assert message.count("\n") == 1
    assert not list(tmp_path.iterdir())
