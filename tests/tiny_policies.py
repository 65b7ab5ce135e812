"""Tiny Push-T policies of every kind that the reference implementation stands in for, with random weights."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from bacinfer.policies import Checkpoint, write_checkpoint
from bacinfer.policies.checkpoint import create_policy
from bacinfer.policies.reference import LinearNormalizer
from bacinfer.training.configuration import read_config

K = 10
TINY = [
    "policy.model.n_layer=2",
    "policy.model.n_head=2",
    "policy.model.n_emb=16",
    f"policy.noise_scheduler.num_train_timesteps={K}",
    f"policy.num_inference_steps={K}",
]
INPAINTING = ["obs_as_cond=false"]

VARIANTS: dict[str, list[str]] = {
    "causal": [],
    "not_causal": ["policy.model.causal_attn=false"],
    "condition_encoder": ["policy.model.n_cond_layers=2"],
    "inpainting": INPAINTING,
    "inpainting_condition_encoder": [*INPAINTING, "policy.model.n_cond_layers=1"],
    "encoder_only": [*INPAINTING, "policy.model.time_as_cond=false"],
    "encoder_only_not_causal": [
        *INPAINTING,
        "policy.model.time_as_cond=false",
        "policy.model.causal_attn=false",
    ],
    "action_steps_only": ["pred_action_steps_only=true", "policy.model.horizon=8"],
    "fewer_inference_steps": ["policy.num_inference_steps=5"],
    "sample_prediction": ["policy.noise_scheduler.prediction_type=sample"],
}


def tiny_config(variant: str = "causal", *overrides: str) -> DictConfig:
    return copy.deepcopy(_tiny_config(variant, overrides))


@cache  # composing takes Hydra 0.3 s
def _tiny_config(variant: str, overrides: tuple[str, ...]) -> DictConfig:
    return read_config([*TINY, *VARIANTS[variant], *overrides])


def randomise(policy: Any, seed: int = 0) -> Any:
    """Weights large enough that every one of them, and the attention masks, show in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "normalizer" not in name:
                scale = 0.1 if parameter.ndim == 1 or "head" in name else 0.35
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return policy


def fitted_normalizer() -> LinearNormalizer:
    steps = torch.linspace(0, 1, 50)[:, None]
    return LinearNormalizer.fit({"obs": steps * torch.linspace(100, 500, 20), "action": 512 * steps.repeat(1, 2)})


def observations(batch: int = 3) -> dict[str, torch.Tensor]:
    return {"obs": 400 * torch.rand(batch, 2, 20, generator=torch.Generator().manual_seed(1))}


def write_tiny_checkpoint(path: Path, *overrides: str) -> Path:
    """A checkpoint of the causal variant; `overrides` are entries of its configuration, ``key=value``."""
    cfg = tiny_config("causal", *overrides)
    torch.manual_seed(0)
    policy = randomise(create_policy(Checkpoint(path, cfg, {})))
    pixels = {name: (torch.zeros(width), torch.full((width,), 512.0)) for name, width in (("obs", 20), ("action", 2))}
    policy.set_normalizer(LinearNormalizer.from_ranges(pixels))
    weights = policy.state_dict()
    write_checkpoint(path, cfg, {"model": weights, "ema_model": weights}, {})
    return path
