"""Fixtures of the analysis: a task without a simulator, and a small Push-T checkpoint for the commands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from analysis_helpers import NUM_STEPS, FakeTask
from omegaconf import OmegaConf

from bacinfer.assets import RunAssets
from bacinfer.policies import write_checkpoint
from bacinfer.policies.reference import DiffusionTransformerLowdimPolicy, LinearNormalizer, TransformerForDiffusion

SCHEDULER = {"num_train_timesteps": NUM_STEPS, "beta_schedule": "squaredcos_cap_v2", "clip_sample": True}
MODEL = {
    "input_dim": 2,
    "output_dim": 2,
    "horizon": 8,
    "n_obs_steps": 2,
    "cond_dim": 20,
    "n_layer": 2,
    "n_head": 2,
    "n_emb": 16,
    "causal_attn": True,
    "obs_as_cond": True,
}
POLICY = {"horizon": 8, "obs_dim": 20, "action_dim": 2, "n_action_steps": 4, "n_obs_steps": 2, "obs_as_cond": True}


@pytest.fixture
def task() -> FakeTask:
    return FakeTask()


@pytest.fixture
def run(tmp_path: Path) -> RunAssets:
    return RunAssets(tmp_path / "assets" / "original")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Push-T policy of two layers with random weights, K = 10."""
    from diffusers import DDPMScheduler

    package = "diffusion_policy"
    cfg = OmegaConf.create(
        {
            "n_obs_steps": 2,
            "training": {"use_ema": True},
            "policy": {
                "_target_": f"{package}.policy.diffusion_transformer_lowdim_policy.DiffusionTransformerLowdimPolicy",
                "model": {
                    "_target_": f"{package}.model.diffusion.transformer_for_diffusion.TransformerForDiffusion",
                    **MODEL,
                },
                "noise_scheduler": {"_target_": "diffusers.schedulers.scheduling_ddpm.DDPMScheduler", **SCHEDULER},
                **POLICY,
            },
            "task": {
                "name": "pusht_lowdim",
                "env_runner": {"_target_": f"{package}.env_runner.pusht_keypoints_runner.PushTKeypointsRunner"},
            },
        }
    )
    torch.manual_seed(0)
    policy = DiffusionTransformerLowdimPolicy(TransformerForDiffusion(**MODEL), DDPMScheduler(**SCHEDULER), **POLICY)
    pixels = {name: (torch.zeros(width), torch.full((width,), 512.0)) for name, width in (("obs", 20), ("action", 2))}
    policy.set_normalizer(LinearNormalizer.from_ranges(pixels))
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.ckpt"
    write_checkpoint(path, cfg, {"ema_model": policy.state_dict()}, {})
    return path
