"""Checkpoints of every type that hold a plan, as LeRobot's own factory makes policies of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("lerobot") is None:
    pytest.skip("needs lerobot, in an environment of its own", allow_module_level=True)

from lerobot.configs.policies import PreTrainedConfig
from lerobot.envs.configs import PushtEnv
from lerobot.policies.factory import make_policy

import bacinfer.lerobot
import lerobot_policy_bacinfer.processor_bac
import tiny_lerobot as tiny
from bacinfer import CacheSchedule, Sampler, SamplingPlan
from bacinfer.commands.cli import main
from bacinfer.lerobot.registry import SUPPORTED_TYPES
from tiny_lerobot_parts import tiny_parts


def act(policy: Any) -> torch.Tensor:
    torch.manual_seed(5)
    with torch.no_grad():
        return bacinfer.lerobot.handle(policy)(tiny.observation(policy))


def made_by_lerobot(policy_type: str, directory: Path, checkpoint: Path) -> Any:
    """As `lerobot-eval --policy.path` makes it, where it is not the environment that says which pictures there are."""
    config = PreTrainedConfig.from_pretrained(checkpoint)
    config.pretrained_path = checkpoint
    with tiny_parts(policy_type, directory):
        return make_policy(config, env_cfg=PushtEnv(), rename_map={tiny.IMAGE: tiny.IMAGE})


@pytest.mark.parametrize("policy_type", SUPPORTED_TYPES)
def test_lerobot_makes_a_policy_that_runs_by_its_plan(policy_type: str, tmp_path: Path) -> None:
    policy = getattr(tiny, policy_type)(tmp_path)
    plain = act(policy)
    policy.save_pretrained(tmp_path / "checkpoint")
    keys = bacinfer.lerobot.summary(policy).blocks
    plan = SamplingPlan(CacheSchedule.periodic(keys, 4, 2), Sampler("own", 4))
    plan.save(tmp_path / "plan.json")
    paths = [str(tmp_path / name) for name in ("checkpoint", "plan.json", "out")]
    with tiny_parts(policy_type, tmp_path):
        assert main(["lerobot", "export", *paths]) == 0

    exported = made_by_lerobot(policy_type, tmp_path, tmp_path / "out")
    assert exported.config.type == f"{policy_type}_bac"
    found = bacinfer.lerobot.summary(exported)
    assert (found.schedule, found.sampler) == (plan.cache, plan.sampler)
    cached = act(exported)
    assert torch.equal(cached, act(bacinfer.lerobot.apply(policy, plan)))
    assert not torch.equal(cached, plain)
    assert torch.equal(act(bacinfer.lerobot.remove(exported)), plain)


@pytest.mark.parametrize("policy_type", SUPPORTED_TYPES)
def test_lerobot_finds_what_makes_processors(policy_type: str) -> None:
    found = getattr(lerobot_policy_bacinfer.processor_bac, f"make_{policy_type}_bac_pre_post_processors")
    assert found.__module__ == f"lerobot.policies.{policy_type}.processor_{policy_type}"
