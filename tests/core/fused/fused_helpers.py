"""Tiny Diffusion Policy policies for the fused engine, with a normaliser that leaves actions in [-1, 1] units."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from bacinfer import FastDiffusionPolicy
from bacinfer.policies import Checkpoint
from bacinfer.policies.checkpoint import create_policy
from bacinfer.policies.reference import LinearNormalizer
from tiny_policies import observations, randomise, tiny_config

apply_cache, remove_cache = FastDiffusionPolicy.apply_cache, FastDiffusionPolicy.remove_cache


def make_policy(variant: str = "causal", *overrides: str, scheduler: Any = None) -> Any:
    """A policy with random weights whose actions are its normalised ones."""
    torch.manual_seed(0)
    policy = randomise(create_policy(Checkpoint(Path("tiny.ckpt"), tiny_config(variant, *overrides), {})))
    units = {"obs": (torch.zeros(20), torch.full((20,), 512.0)), "action": (-torch.ones(2), torch.ones(2))}
    policy.set_normalizer(LinearNormalizer.from_ranges(units))
    if scheduler is not None:
        policy.noise_scheduler = scheduler
    return policy.eval()


def make_scheduler(kind: str = "ddpm", num_train_timesteps: int = 10, **settings: Any) -> Any:
    scheduler_class = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}[kind]
    return scheduler_class(num_train_timesteps=num_train_timesteps, beta_schedule="squaredcos_cap_v2", **settings)


def act(policy: Any, batch: int = 3, seed: int = 1) -> Tensor:
    """All that one call puts out, [B, T, action and painted observation], with the noise of `seed`."""
    torch.manual_seed(seed)
    with torch.no_grad():
        result = policy.predict_action(observations(batch))
    scaled = [result["action_pred"], *([result["obs_pred"] / 512] if "obs_pred" in result else [])]
    return torch.cat(scaled, dim=-1)


def act_with(policy: Any, engine: str, batch: int = 3, **cache: Any) -> Tensor:
    """The same of a copy, with a cache that `engine` runs."""
    return act(apply_cache(copy.deepcopy(policy), engine=engine, **cache), batch)
