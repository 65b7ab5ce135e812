"""Tiny image policies of every kind that the reference implementation stands in for, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from bacinfer.policies import write_checkpoint
from bacinfer.policies.reference import STAND_INS, DiffusionTransformerHybridImagePolicy, LinearNormalizer
from bacinfer.training.configuration import read_config
from tiny_policies import K

TINY = [
    "policy.n_layer=2",
    "policy.n_head=2",
    "policy.n_emb=16",
    f"policy.noise_scheduler.num_train_timesteps={K}",
    f"policy.num_inference_steps={K}",
]

VARIANTS: dict[str, list[str]] = {
    "pusht": [],
    "square": ["policy.crop_shape=[76,76]"],
    "batch_norm": ["policy.obs_encoder_group_norm=false"],
    "random_crop": ["policy.eval_fixed_crop=false"],
    "no_crop": ["policy.crop_shape=null"],
    "odd_crop": ["policy.crop_shape=[81,83]"],
    "condition_encoder": ["policy.n_cond_layers=2"],
    "inpainting": ["obs_as_cond=false"],
}

# what robomimic's tasks show: two cameras, and the arm's own pose
SQUARE: dict[str, Any] = {
    "obs": {
        "agentview_image": {"shape": [3, 84, 84], "type": "rgb"},
        "robot0_eye_in_hand_image": {"shape": [3, 84, 84], "type": "rgb"},
        "robot0_eef_pos": {"shape": [3]},
        "robot0_eef_quat": {"shape": [4]},
        "robot0_gripper_qpos": {"shape": [2]},
    },
    "action": {"shape": [10]},
}


def tiny_image_config(variant: str = "pusht", *overrides: str) -> DictConfig:
    cfg = read_config(["task=pusht_image", *TINY, *VARIANTS[variant], *overrides])
    if variant == "square":
        cfg.task.shape_meta = cfg.shape_meta = cfg.policy.shape_meta = SQUARE
    return cfg


def image_policy(variant: str = "pusht", *overrides: str) -> DiffusionTransformerHybridImagePolicy:
    """Of the reference class, also where the diffusion_policy package is installed."""
    cfg = tiny_image_config(variant, *overrides)
    settings: Any = OmegaConf.to_container(cfg.policy)
    settings["_target_"] = STAND_INS[settings["_target_"]]
    torch.manual_seed(0)
    policy = randomise_all(instantiate(settings)).eval()
    policy.set_normalizer(image_normalizer(cfg))
    return policy


def randomise_all(policy: Any) -> Any:
    """Moves every weight and statistic so far that each shows in the output, and no more: features stay moderate."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in policy.state_dict().items():
            noise = torch.randn(value.shape, generator=generator)
            if name.startswith("model.") and not name.endswith("mask"):
                value.add_(0.1 * noise)
            elif value.ndim >= 2 and name.endswith("weight"):
                value.mul_(1 + 0.3 * noise)
            elif name.endswith(("weight", "bias", "running_mean", "running_var")):
                value.add_(0.1 * noise.abs())
    return policy


def image_normalizer(cfg: DictConfig) -> LinearNormalizer:
    """Images from 0 to 1, vectors from 0 to 512."""
    fields = {**cfg.shape_meta.obs, "action": cfg.shape_meta.action}
    vectors = {name: field.shape for name, field in fields.items() if len(field.shape) == 1}
    normalizer = LinearNormalizer.from_ranges(
        {name: (torch.zeros(*shape), torch.full(tuple(shape), 512.0)) for name, shape in vectors.items()}
    )
    for name in fields.keys() - vectors.keys():
        normalizer.add_image(name)
    return normalizer


def image_observations(variant: str = "pusht", batch: int = 2, steps: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    observations = {}
    for name, field in tiny_image_config(variant).shape_meta.obs.items():
        unit = torch.rand(batch, steps, *field.shape, generator=generator)
        observations[name] = unit if len(field.shape) == 3 else 512 * unit
    return observations


def write_tiny_image_checkpoint(path: Path, *overrides: str) -> Path:
    """A checkpoint of the Push-T variant; `overrides` are entries of its configuration, ``key=value``."""
    weights = image_policy("pusht", *overrides).state_dict()
    write_checkpoint(path, tiny_image_config("pusht", *overrides), {"model": weights, "ema_model": weights}, {})
    return path


def act(policy: Any, obs: dict[str, torch.Tensor], seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    with torch.no_grad():
        return policy.predict_action(obs)
