"""The fused engine on the real package's policy. Skipped where it is not installed."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip(
    "diffusion_policy.policy.diffusion_transformer_lowdim_policy", reason="needs the diffusion_policy package"
)

import torch

from bacinfer import FastDiffusionPolicy
from bacinfer.core.engines.fused.recognition import unknown_function
from bacinfer.core.engines.loops import ConditionalSample
from bacinfer.policies import Checkpoint
from bacinfer.policies.checkpoint import create_policy
from core.fused.fused_helpers import assert_agree, with_cache
from tiny_policies import VARIANTS, fitted_normalizer, observations, randomise, tiny_config


def test_its_functions_are_known() -> None:
    policy = create_policy(Checkpoint(Path("none"), tiny_config(), {}))
    assert unknown_function(ConditionalSample(policy)) is None


def test_a_loop_of_a_subclass_is_not_known() -> None:
    policy = create_policy(Checkpoint(Path("none"), tiny_config(), {}))

    class Clamped(type(policy)):  # type: ignore[misc]
        @functools.wraps(type(policy).conditional_sample)
        def conditional_sample(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            return super().conditional_sample(*args, **kwargs).clamp(-0.5, 0.5)

    policy.__class__ = Clamped
    assert unknown_function(ConditionalSample(policy)) == f"{Clamped.__qualname__}.conditional_sample"


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_chosen_and_equals_the_eager_engine(variant: str) -> None:
    policy = randomise(create_policy(Checkpoint(Path("none"), tiny_config(variant), {}))).eval()
    assert type(policy).__module__.startswith("diffusion_policy.")
    policy.set_normalizer(fitted_normalizer())

    def act(cached: Any) -> torch.Tensor:
        torch.manual_seed(0)
        with torch.no_grad():
            return cached.normalizer["action"].normalize(cached.predict_action(observations())["action_pred"])

    for interval in (1, 4):
        fused = with_cache(policy, "auto", cache_threshold=interval)
        assert_agree(act(fused), with_cache(policy, "eager", cache_threshold=interval), act)
        assert FastDiffusionPolicy.summary(fused).engine == "fused"
    assert_agree(act(with_cache(policy, "fused", cache_mode="original")), policy, act)
