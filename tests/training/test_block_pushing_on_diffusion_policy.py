"""Block pushing: its settings are the real package's, and its environment runs. Skipped where that is not installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

pytest.importorskip("diffusion_policy.env_runner.blockpush_lowdim_runner", reason="needs the diffusion_policy package")

import diffusion_policy

from bacinfer.commands import eval as evaluate
from bacinfer.commands import train
from bacinfer.files import read_arrays
from bacinfer.policies import Checkpoint, write_checkpoint
from bacinfer.policies.checkpoint import create_policy
from bacinfer.policies.reference import LinearNormalizer
from bacinfer.training import block_pushing_demonstrations
from bacinfer.training.block_pushing_demonstrations import record_block_pushing
from bacinfer.training.block_pushing_expert import MAX_STEP
from bacinfer.training.block_pushing_table import STEPS
from bacinfer.training.configuration import read_config
from bacinfer.training.dataset import read_demonstrations

TINY = ["policy.model.n_layer=1", "policy.model.n_head=2", "policy.model.n_emb=8", "policy.num_inference_steps=5"]
OUR_OWN = {"train_start_seed": 5000}  # of the environment: beyond the demonstrations


def published() -> DictConfig:
    directory = Path(next(iter(diffusion_policy.__path__))) / "config"
    OmegaConf.register_new_resolver("eval", eval, replace=True)
    with initialize_config_dir(str(directory), version_base=None):
        return compose("train_diffusion_transformer_lowdim_workspace", overrides=["task=blockpush_lowdim_seed"])


@pytest.mark.parametrize("section", ["policy", "ema", "optimizer", "task.env_runner"])
def test_settings_are_the_published_ones(section: str) -> None:
    ours, theirs = (
        OmegaConf.to_container(OmegaConf.select(cfg, section), resolve=True)
        for cfg in (read_config(["task=block_pushing"]), published())
    )
    assert {**ours, **OUR_OWN} == {**theirs, **OUR_OWN}


def test_evaluation_in_its_own_environment(tmp_path: Path) -> None:
    cfg = read_config(["task=block_pushing", *TINY, "task.env_runner.max_steps=6"])
    policy = create_policy(Checkpoint(tmp_path, cfg, {}))
    ranges = {name: (-torch.ones(width), torch.ones(width)) for name, width in (("obs", 16), ("action", 2))}
    policy.set_normalizer(LinearNormalizer.from_ranges(ranges))
    weights = policy.state_dict()
    write_checkpoint(tmp_path / "tiny.ckpt", cfg, {"model": weights, "ema_model": weights}, {})
    output_dir = tmp_path / "out"
    flags = ["-c", str(tmp_path / "tiny.ckpt"), "-o", str(output_dir), "--n_test", "2", "--latency_calls", "1"]
    assert evaluate.main([*flags, "--cache_mode", "threshold", "--num_caches", "2", "--debug"]) == 0
    assert len(list(output_dir.glob("runs/*/media/100000.mp4"))) == 2
    assert (output_dir / "media" / "side_by_side.mp4").is_file()


def test_demonstrations_of_the_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_pushing_demonstrations, "IMAGINED", 3)
    record_block_pushing(tmp_path / "demos.npz", 2)
    arrays, settings = read_arrays(tmp_path / "demos.npz")
    assert settings == {"env_name": "block_pushing", "count": 2}
    assert sorted(set(arrays["seeds"])) == [-1, 20_000, 20_001]
    assert np.sum(arrays["seeds"] == -1) == 6
    last = arrays["episode_ends"][-1]
    assert len(arrays["obs"]) == last
    quarter = (last - 6 * STEPS) // 4
    np.testing.assert_array_equal(arrays["obs"][:quarter, 0:3], arrays["obs"][quarter : 2 * quarter, 3:6])
    np.testing.assert_array_equal(arrays["action"][:quarter], arrays["action"][quarter : 2 * quarter])
    demonstrations = read_demonstrations(tmp_path / "demos.npz")
    assert len(demonstrations.episode_ends) == len(arrays["seeds"])
    assert demonstrations.action.norm(dim=1).max() <= MAX_STEP + 1e-6
    last = [int(end) for end, seed in zip(arrays["episode_ends"], arrays["seeds"], strict=True) if seed == 20_000][-1]
    blocks, squares = demonstrations.obs[last - 1, [0, 1, 3, 4]], demonstrations.obs[last - 1, [10, 11, 13, 14]]
    distances = torch.cdist(blocks.reshape(2, 2), squares.reshape(2, 2))
    assert distances.min(dim=1).values.max() < 0.1  # solved within 0.05, a few steps later


def test_one_command_records_and_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_pushing_demonstrations, "IMAGINED", 100)
    monkeypatch.chdir(tmp_path)
    settings = [*TINY, "task.dataset.num_demonstrations=1", "task.env_runner.max_steps=4"]
    assert train.main(["-o", "run", "task=block_pushing_expert", *settings, "training.num_epochs=1"]) == 0
    assert read_arrays(Path("data/block_pushing/expert.npz"))[1]["count"] == 1
    assert train.main(["-o", "run", "--export", "small.ckpt"]) == 0
    assert (
        evaluate.main(["-c", "small.ckpt", "-o", "out", "--n_test", "1", "--latency_calls", "1", "--skip_video"]) == 0
    )
