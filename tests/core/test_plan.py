from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import bacinfer
from bacinfer import CacheSchedule, PolicyHandle, Sampler, WarmStart
from bacinfer.core.plan import Fingerprint, SamplingPlan
from core.fused.fused_helpers import make_policy
from helpers import TinyPolicy

SCHEDULE = CacheSchedule(10, {"decoder.layers.0_sa_block": (0, 4)}, "by hand")
WARM_CACHE = CacheSchedule(3, {"decoder.layers.0_sa_block": (0, 2)})
EVERYTHING = {
    "cache": SCHEDULE,
    "sampler": Sampler("ddim", tuple(range(9, -1, -1)), 0.5),
    "warm_start": WarmStart(Sampler("ddim", (4, 2, 0)), WARM_CACHE, 0.3, 8),
}


def test_a_plan_comes_back_from_its_file(tmp_path: Path) -> None:
    for made_for in (None, Fingerprint.of(TinyPolicy()), Fingerprint.of(make_policy())):
        for parts in ({}, {"cache": SCHEDULE}, {"sampler": Sampler("own", 5)}, {**EVERYTHING}):
            plan = SamplingPlan(**parts, made_for=made_for)
            plan.save(tmp_path / "plan.json")
            assert SamplingPlan.load(tmp_path / "plan.json") == plan


def test_plans_of_before_have_neither_sampler_nor_warm_start() -> None:
    data = {"bacinfer_plan": 1, "made_for": None, "cache": SCHEDULE.to_data()}
    assert SamplingPlan.from_json(json.dumps(data)) == SamplingPlan(SCHEDULE)


def test_a_cache_is_for_the_steps_of_its_sampler() -> None:
    with pytest.raises(ValueError, match="the cache is for 10 denoising steps, sampler own:4 takes others"):
        SamplingPlan(SCHEDULE, Sampler("own", 4))
    twice_a_step = SamplingPlan(SCHEDULE, Sampler("own", 5))
    with pytest.raises(ValueError, match="made for K = 10 denoising steps, the policy has num_inference_steps = 5"):
        bacinfer.apply(make_policy(), twice_a_step)


def test_fingerprints_tell_policies_apart() -> None:
    policy = make_policy()
    before = Fingerprint.of(policy)
    assert Fingerprint.of(make_policy()) == before
    assert "DDPMScheduler" in before.scheduler.values()
    with torch.no_grad():
        policy.model.head.bias[0] += 1
    (difference,) = before.differences(Fingerprint.of(policy))
    assert difference.startswith("weights: ")
    policy.num_inference_steps = 3
    assert before.differences(Fingerprint.of(policy))[1] == "num_inference_steps: 10, here 3"


def test_as_many_calls_in_fewer_steps_are_another_loop() -> None:
    policy = TinyPolicy()
    parts = (policy.model, 10, (policy, "predict_action"))
    policy.num_steps = 5
    twice_a_step = PolicyHandle(*parts, num_steps=(policy, "num_steps"))
    assert Fingerprint.of(twice_a_step) == Fingerprint.of(twice_a_step)
    (difference,) = Fingerprint.of(PolicyHandle(*parts)).differences(Fingerprint.of(twice_a_step))
    assert difference == "scheduler: {}, here {'num_steps': 5}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no sampling plan"),
        ("[" * 100_000, "no sampling plan"),
        ("[]", "expected a plan of version 1, found 'list'"),
        ("{}", "expected a plan of version 1, found None"),
        (json.dumps({"bacinfer_plan": 2}), "found 2"),
        (json.dumps({"bacinfer_plan": 1, "cache": None}), "a part is missing or damaged: 'made_for'"),
        (json.dumps({"bacinfer_plan": 1, "cache": None, "made_for": {"hue": 1}}), "a part is missing or damaged"),
        (json.dumps({"bacinfer_plan": 1, "cache": {"version": 9}, "made_for": None}), "a schedule of version 1"),
        (
            json.dumps({"bacinfer_plan": 1, "cache": None, "made_for": None, "sampler": {"kind": "own"}}),
            "not a sampler",
        ),
        (json.dumps({"bacinfer_plan": 1, "cache": None, "made_for": None, "warm_start": []}), "not a warm start"),
        (
            json.dumps(
                {
                    "bacinfer_plan": 1,
                    "cache": None,
                    "made_for": None,
                    "sampler": {"kind": "own", "steps": 2.5, "eta": 0},
                }
            ),
            "at least one step, got 2.5",
        ),
        (json.dumps({"bacinfer_plan": 1, "cache": None, "made_for": None, "warp": 9}), "it asks for warp, which this"),
    ],
)
def test_other_files_are_refused_with_their_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        SamplingPlan.load(path)
    assert str(path) in str(error.value)
