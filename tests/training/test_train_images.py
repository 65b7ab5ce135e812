"""Training a policy that sees: the same trainer, on pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bacinfer.commands.train import main
from bacinfer.policies import load_policy, read_checkpoint
from bacinfer.training.configuration import read_config
from bacinfer.training.demonstrations import load_demonstrations
from bacinfer.training.normalization import fit_normalizer
from bacinfer.training.pusht_images import ImageDemonstrations
from bacinfer.training.trainer import Trainer
from bacinfer.training.weights import export_checkpoint

# 10 windows in batches of 4: two steps an epoch
TINY = [
    "task=pusht_image",
    "policy.n_layer=1",
    "policy.n_head=2",
    "policy.n_emb=8",
    "policy.crop_shape=[32,32]",
    "policy.noise_scheduler.num_train_timesteps=5",
    "policy.num_inference_steps=5",
    "dataloader.batch_size=4",
    "training.num_epochs=2",
    "training.lr_warmup_steps=1",
    "training.log_every=2",
    "optimizer.learning_rate=0.001",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "demos.npz"
    state, action = random.uniform(100, 400, (12, 5)), random.uniform(100, 400, (12, 2))
    np.savez(path, state=state, action=action, episode_ends=np.array([7, 12]))
    return path


def test_the_command(data: Path, tmp_path: Path) -> None:
    settings = [*TINY, f"training.frames_dir={tmp_path / 'frames'}", "training.noise_draws=3"]
    assert main(["-o", str(tmp_path / "run"), "--data", str(data), *settings]) == 0
    steps = [json.loads(line)["global_step"] for line in (tmp_path / "run" / "logs.jsonl").read_text().splitlines()]
    assert steps == [2, 4]
    assert len(list((tmp_path / "frames").glob("*.npy"))) == 1

    latest, small = tmp_path / "run" / "checkpoints" / "latest.ckpt", tmp_path / "small.ckpt"
    export_checkpoint(latest, small)
    # of two models and two moments in single precision one model in half precision is left; no weight comes twice
    assert small.stat().st_size < latest.stat().st_size / 8
    policy, trained = load_policy(small), read_checkpoint(latest).state_dicts["ema_model"]
    for name, value in policy.state_dict().items():
        expected = trained[name]
        if not name.startswith("normalizer."):
            expected = expected.to(torch.bfloat16 if name.startswith("obs_encoder.") else torch.float16).float()
        torch.testing.assert_close(value, expected, rtol=0, atol=0)
    export_checkpoint(small, again := tmp_path / "again.ckpt")
    assert again.stat().st_size == small.stat().st_size
    obs = {"image": torch.rand(1, 2, 3, 96, 96), "agent_pos": torch.full((1, 2, 2), 250.0)}
    assert policy.predict_action(obs)["action"].shape == (1, 8, 2)


def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(data: Path, tmp_path: Path) -> None:
    def trainer(name: str) -> Trainer:
        cfg = read_config([*TINY, f"training.frames_dir={tmp_path / 'frames'}"])
        return Trainer(cfg, load_demonstrations(cfg, data), tmp_path / name)

    whole = trainer("whole")
    assert whole.run()
    first = trainer("parts")
    first.step()
    first.save(first.latest_path)
    torch.manual_seed(99)  # crops are random too
    second = trainer("parts")
    assert second.run()
    for name, value in whole.ema_policy.state_dict().items():
        assert torch.equal(value, second.ema_policy.state_dict()[name]), name


def demonstrations() -> ImageDemonstrations:
    image = torch.zeros(12, 3, 96, 96, dtype=torch.uint8)
    return ImageDemonstrations(image, 512 * torch.rand(12, 2), 512 * torch.rand(12, 2), (12,), n_obs_steps=2)


@pytest.mark.parametrize("normalize_obs", ["range", "std"])
def test_pictures_are_mapped_from_0_to_1(normalize_obs: str) -> None:
    data = demonstrations()
    normalizer = fit_normalizer(data, normalize_obs)
    assert normalizer["image"].normalize(torch.tensor([0.0, 1.0])).tolist() == [-1, 1]
    assert normalizer["action"].normalize(data.action).aminmax() == pytest.approx((-1, 1))
    position = normalizer["agent_pos"].normalize(data.agent_pos)
    if normalize_obs == "range":
        assert position.aminmax() == pytest.approx((-1, 1))
    else:
        torch.testing.assert_close(position.std(0), torch.ones(2))


def test_how_many_steps_are_seen(data: Path, tmp_path: Path) -> None:
    for settings, steps in ((["n_obs_steps=3"], 3), (["obs_as_cond=false"], 10)):
        cfg = read_config([*TINY, *settings, f"training.frames_dir={tmp_path}"])
        batch = load_demonstrations(cfg, data).batch(torch.arange(10)[None])
        assert batch["obs"]["image"].shape == (1, steps, 3, 96, 96)


def test_the_configuration_is_one_of_diffusion_policy_s_image_workspace() -> None:
    cfg = read_config(["task=pusht_image"])
    assert cfg._target_.endswith(".TrainDiffusionTransformerHybridWorkspace")
    assert cfg.policy._target_.endswith(".DiffusionTransformerHybridImagePolicy")
    assert cfg.policy.shape_meta == cfg.shape_meta == cfg.task.shape_meta
    assert (cfg.policy.horizon, cfg.policy.n_obs_steps, cfg.policy.n_action_steps) == (10, 2, 8)
    assert (cfg.task.dataset.pad_before, cfg.task.dataset.pad_after) == (1, 7)
    assert set(cfg.optimizer) == {
        "learning_rate",
        "betas",
        "transformer_weight_decay",
        "obs_encoder_weight_decay",
    }
    assert "model" not in cfg.policy
    assert read_config(["task=pusht_image", "policy.crop_shape=[76,76]"]).policy.crop_shape == [76, 76]
