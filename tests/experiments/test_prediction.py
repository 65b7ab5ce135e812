"""The plan for a latency, without episodes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bacinfer
from bacinfer import Sampler, SamplingPlan, WarmStart
from core.fused.fused_helpers import make_policy
from tiny_policies import observations

PLANS = {f"own:{n}": SamplingPlan(sampler=Sampler("own", n)) for n in (1, 3, 9)}


def test_the_plan_whose_actions_are_most_like_the_plain_policys(tmp_path: Path) -> None:
    policy = make_policy()
    before = dict(vars(policy))
    found = bacinfer.calibrate(
        policy, None, tmp_path, observations=[observations(1)] * 3, latency_ms=10_000, plans=PLANS
    )
    assert found.name == "own:9"
    assert found.distances["own:9"] < found.distances["own:3"] < found.distances["own:1"]
    assert SamplingPlan.load(tmp_path / "plan.json") == PLANS["own:9"]
    assert json.loads((tmp_path / "prediction.json").read_text())["chosen"] == "own:9"
    assert "This is a prediction" in str(found)
    assert vars(policy) == before


def test_default_plans(tmp_path: Path) -> None:
    found = bacinfer.calibrate(make_policy(), None, tmp_path, observations=[observations(1)], latency_ms=10_000)
    assert {"own:5", "dpm:3", "own:10+uniform:5"} <= found.distances.keys()


def test_what_is_not_enough(tmp_path: Path) -> None:
    policy, seen = make_policy(), [observations(1)]
    with pytest.raises(ValueError, match="give one of them"):
        bacinfer.calibrate(policy, None, tmp_path)
    with pytest.raises(ValueError, match="nothing shows that a plan loses nothing"):
        bacinfer.calibrate(policy, None, tmp_path, observations=seen)
    with pytest.raises(ValueError, match="nothing shows that a plan loses nothing"):
        bacinfer.calibrate(policy, None, tmp_path, observations=seen, latency_ms=5, stateful=True)
    with pytest.raises(ValueError, match="no observations to predict at"):
        bacinfer.calibrate(policy, None, tmp_path, observations=[], latency_ms=5)
    with pytest.raises(ValueError, match=r"no plan takes 1e-06 ms a call or less .* the nearest is own:"):
        bacinfer.calibrate(policy, None, tmp_path, observations=seen, latency_ms=1e-6, plans=PLANS)
    warm = {"warm": SamplingPlan(warm_start=WarmStart(Sampler("ddim", (4, 0))))}
    with pytest.raises(ValueError, match="shows in episodes only"):
        bacinfer.calibrate(policy, None, tmp_path, observations=seen, latency_ms=50, plans=warm)
