"""The fused engine on the real package's policy. Skipped where it is not installed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

pytest.importorskip(
    "diffusion_policy.policy.diffusion_transformer_lowdim_policy", reason="needs the diffusion_policy package"
)

import torch

from bacinfer import FastDiffusionPolicy
from bacinfer.policies import Checkpoint
from bacinfer.policies.checkpoint import create_policy
from tiny_policies import VARIANTS, fitted_normalizer, observations, randomise, tiny_config

BOUND = 1e-5  # of normalised actions


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_chosen_and_equals_the_eager_engine(variant: str) -> None:
    policy = randomise(create_policy(Checkpoint(Path("none"), tiny_config(variant), {}))).eval()
    assert type(policy).__module__.startswith("diffusion_policy.")
    policy.set_normalizer(fitted_normalizer())

    def act(**cache: object) -> torch.Tensor:
        cached = FastDiffusionPolicy.apply_cache(copy.deepcopy(policy), **cache)
        torch.manual_seed(0)
        with torch.no_grad():
            actions = policy.normalizer["action"].normalize(cached.predict_action(observations())["action_pred"])
        if cache["cache_mode"] != "original":
            assert FastDiffusionPolicy.summary(cached).engine == ("eager" if "engine" in cache else "fused")
        return actions

    for caching in (
        {"cache_mode": "threshold", "cache_threshold": 1},
        {"cache_mode": "threshold", "cache_threshold": 4},
    ):
        torch.testing.assert_close(act(**caching), act(**caching, engine="eager"), rtol=0, atol=BOUND)
    lossless = act(cache_mode="original", engine="fused")
    torch.testing.assert_close(lossless, act(cache_mode="original"), rtol=0, atol=BOUND)
