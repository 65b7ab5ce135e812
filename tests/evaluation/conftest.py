"""A small Push-T checkpoint with random weights, and a directory with its schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from bacinfer.assets import write_steps
from bacinfer.core.blocks import find_blocks
from bacinfer.policies import load_policy, write_checkpoint
from bacinfer.policies.reference import DiffusionTransformerLowdimPolicy, LinearNormalizer, TransformerForDiffusion

K = 10
MAX_STEPS = 24
MODEL = {
    "input_dim": 2,
    "output_dim": 2,
    "horizon": 16,
    "n_obs_steps": 2,
    "cond_dim": 20,
    "n_layer": 2,
    "n_head": 2,
    "n_emb": 16,
    "causal_attn": True,
}
POLICY = {"horizon": 16, "obs_dim": 20, "action_dim": 2, "n_action_steps": 8, "n_obs_steps": 2, "obs_as_cond": True}
SCHEDULER = {"num_train_timesteps": K, "beta_schedule": "squaredcos_cap_v2", "clip_sample": True}
CONFIG = {
    "n_obs_steps": 2,
    "training": {"use_ema": False},
    "policy": {
        "_target_": "diffusion_policy.policy.diffusion_transformer_lowdim_policy.DiffusionTransformerLowdimPolicy",
        "model": {
            "_target_": "diffusion_policy.model.diffusion.transformer_for_diffusion.TransformerForDiffusion",
            **MODEL,
        },
        "noise_scheduler": {"_target_": "diffusers.schedulers.scheduling_ddpm.DDPMScheduler", **SCHEDULER},
        **POLICY,
    },
    "task": {
        "name": "pusht_lowdim",
        "env_runner": {
            "_target_": "diffusion_policy.env_runner.pusht_keypoints_runner.PushTKeypointsRunner",
            "legacy_test": True,
            "max_steps": MAX_STEPS,
            "n_obs_steps": 2,
            "n_action_steps": 8,
        },
    },
}


def write_tiny_checkpoint(path: Path, **changes: Any) -> Path:
    from diffusers import DDPMScheduler

    torch.manual_seed(0)
    policy = DiffusionTransformerLowdimPolicy(TransformerForDiffusion(**MODEL), DDPMScheduler(**SCHEDULER), **POLICY)
    for parameter in policy.model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    pixels = {name: (torch.zeros(width), torch.full((width,), 512.0)) for name, width in (("obs", 20), ("action", 2))}
    policy.set_normalizer(LinearNormalizer.from_ranges(pixels))
    cfg = OmegaConf.merge(OmegaConf.create(CONFIG), changes)
    write_checkpoint(path, cfg, {"model": policy.state_dict()}, {})
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny.ckpt")


@pytest.fixture
def pusht_policy(checkpoint: Path) -> Any:
    return load_policy(checkpoint)


@pytest.fixture(scope="session")
def steps_dir(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Schedules for num_caches 3 and 5, as the analysis writes them."""
    directory = tmp_path_factory.mktemp("assets") / "pusht" / "original" / "optimal_steps" / "cosine"
    write_tiny_steps(directory, checkpoint)
    return directory


def write_tiny_steps(directory: Path, checkpoint: Path) -> None:
    for block in find_blocks(load_policy(checkpoint).model):
        for steps in ([0, 2, 6], [0, 1, 3, 5, 8]):
            write_steps(directory, block.module_name, "cosine", steps, K)
