"""Block pushing: its settings are the real package's, and its environment runs. Skipped where that is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

pytest.importorskip("diffusion_policy.env_runner.blockpush_lowdim_runner", reason="needs the diffusion_policy package")

import diffusion_policy

from bacinfer.commands import eval as evaluate
from bacinfer.policies import Checkpoint, write_checkpoint
from bacinfer.policies.checkpoint import create_policy
from bacinfer.policies.reference import LinearNormalizer
from bacinfer.training.configuration import read_config

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
