from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from analysis_helpers import FakeTask

import bacinfer
from bacinfer import FastDiffusionPolicy, PolicyHandle, SamplingPlan, assets
from bacinfer.analysis.get_optimal_cache_update_steps import main
from bacinfer.analysis.pipeline import Sampling, analyse_policy
from bacinfer.policies import read_checkpoint
from bacinfer.tasks import make_task
from helpers import TinyPolicy, act, encoder_model, observation

SAMPLING = Sampling("0" * 64, num_inference_steps=10, observations_per_demo=3, noise_seed=11)


def observations(count: int = 3) -> Iterator[dict[str, torch.Tensor]]:
    """Of the first calls of demo 11."""
    return FakeTask().observations(None, 11, count)


@pytest.mark.parametrize(("metric", "num_bu_blocks"), [("cosine", 0), ("cosine", 2), ("l1", 9)])
@pytest.mark.parametrize("make", [None, encoder_model])
def test_it_equals_what_the_files_of_the_analysis_give(
    make: Any, metric: str, num_bu_blocks: int, task: FakeTask, run: assets.RunAssets
) -> None:
    policy = TinyPolicy(make and make())
    num_bu_blocks = min(num_bu_blocks, 5)
    analyse_policy(policy, task, run, [11], [metric], [4], SAMPLING)
    FastDiffusionPolicy.apply_cache(
        policy, optimal_steps_dir=run.steps_dir(metric), num_caches=4, metric=metric, num_bu_blocks=num_bu_blocks
    )
    expected = bacinfer.summary(policy).schedule
    plain = bacinfer.remove(policy)
    assert bacinfer.find_plan(plain, observations(), 4, num_bu_blocks, metric).cache == expected


def test_it_equals_the_command_on_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    command = ["-c", str(checkpoint), "-o", str(tmp_path), "-d", "cpu", "--num_caches", "4", "--metrics", "mse"]
    assert main([*command, "--observations_per_demo", "2"]) == 0
    policy = bacinfer.load_policy(checkpoint)
    steps_dir = assets.RunAssets(tmp_path / "original").steps_dir("mse")
    FastDiffusionPolicy.apply_cache(policy, optimal_steps_dir=steps_dir, num_caches=4, metric="mse", num_bu_blocks=3)
    expected = bacinfer.summary(policy).schedule
    seen = make_task(read_checkpoint(checkpoint).cfg).observations(bacinfer.remove(policy), 11, 2)
    assert bacinfer.find_plan(policy, seen, 4, 3, "mse").cache == expected


def test_a_handle_has_the_plan_of_its_policy() -> None:
    policy = TinyPolicy()
    handle = PolicyHandle(policy.model, 10, (policy, "predict_action"))
    assert bacinfer.find_plan(handle, observations(), 3, 2) == bacinfer.find_plan(policy, observations(), 3, 2)


def test_the_plan_knows_what_it_was_made_for(policy: TinyPolicy, tmp_path: Path) -> None:
    plan = bacinfer.find_plan(policy, observations(1), 3, 2)
    assert plan.cache is not None
    assert all(steps[-1] == 9 for steps in plan.cache.update_steps.values())
    plan.save(tmp_path / "plan.json")
    assert SamplingPlan.load(tmp_path / "plan.json") == plan
    bacinfer.apply(policy, tmp_path / "plan.json")
    other = TinyPolicy()
    other.model.time_emb.weight.data += 1
    with pytest.raises(ValueError, match="made for another policy"):
        bacinfer.apply(other, plan)


def test_the_policy_its_plan_and_the_random_state_are_left_as_found(policy: TinyPolicy) -> None:
    expected = bacinfer.find_plan(policy, observations(1), 3, 2)
    bacinfer.apply(policy, bacinfer.find_plan(policy, observations(1), 1, 0), engine="eager")
    cached, attributes, state = act(policy), dict(vars(policy)), torch.get_rng_state()
    assert bacinfer.find_plan(policy, observations(1), 3, 2) == expected  # of the plain policy
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(vars(policy)) == attributes
    assert torch.equal(act(policy), cached)

    def broken() -> Iterator[dict[str, torch.Tensor]]:
        yield from observations(1)
        raise OSError("the camera is gone")

    with pytest.raises(OSError, match="camera"):
        bacinfer.find_plan(policy, broken(), 3, 2)
    assert torch.equal(act(policy), cached)


def test_other_noise_is_another_plan(policy: TinyPolicy) -> None:
    seeds = [bacinfer.find_plan(policy, observations(1), 3, 0, noise_seed=seed) for seed in range(8)]
    assert len({plan.cache for plan in seeds}) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_updates": 11}, r"num_updates must be an integer in 1\.\.10 .*got 11"),
        ({"num_updates": 2.5}, r"num_updates must be an integer in 1\.\.10 .*got 2\.5"),
        ({"num_bu_blocks": 10}, r"num_bu_blocks must be in 0\.\.9, the number of blocks, got 10"),
        ({"num_bu_blocks": -1}, r"num_bu_blocks must be in 0\.\.9"),
        ({"metric": "cos"}, "unknown metric 'cos'; known are cosine"),
        ({"noise_seed": -1}, "must not be negative"),
    ],
)
def test_what_cannot_be_is_refused(policy: TinyPolicy, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bacinfer.find_plan(policy, [observation(1)], **{"num_updates": 3, "num_bu_blocks": 2, **arguments})


def test_no_observation_and_no_policy(policy: TinyPolicy) -> None:
    with pytest.raises(ValueError, match="no observations"):
        bacinfer.find_plan(policy, iter([]), 3)
    with pytest.raises(TypeError, match="PolicyHandle"):
        bacinfer.find_plan(policy.model, [observation(1)])  # type: ignore[arg-type]
