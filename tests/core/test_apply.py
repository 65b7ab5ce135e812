from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bacinfer
from bacinfer import CacheSchedule, FastDiffusionPolicy, SamplingPlan
from bacinfer.core.blocks import find_blocks
from bacinfer.core.plan import Fingerprint
from core.fused.fused_helpers import make_policy
from helpers import TinyPolicy, act


def plan_for(policy: TinyPolicy) -> SamplingPlan:
    schedule = CacheSchedule.periodic([block.key for block in find_blocks(policy.model)], 10, 4)
    return SamplingPlan(schedule, made_for=Fingerprint.of(policy))


def test_a_plan_a_schedule_and_their_files_are_the_same(policy: TinyPolicy, tmp_path: Path) -> None:
    plan = plan_for(policy)
    assert plan.cache is not None
    plan.save(tmp_path / "plan.json")
    (tmp_path / "schedule.json").write_text(plan.cache.to_json())
    expected = act(FastDiffusionPolicy.apply_cache(policy, cache_threshold=4))
    for same in (plan, plan.cache, tmp_path / "plan.json", str(tmp_path / "schedule.json")):
        assert bacinfer.apply(policy, same) is policy
        assert torch.equal(act(policy), expected)
        assert bacinfer.summary(policy).mode == "plan"


def test_a_plan_without_a_cache_changes_no_action(policy: TinyPolicy) -> None:
    plain = act(policy)
    assert torch.equal(act(bacinfer.apply(policy, SamplingPlan())), plain)
    bacinfer.remove(policy)
    assert "predict_action" not in vars(policy)
    fused = bacinfer.apply(make_policy(), SamplingPlan())
    assert bacinfer.summary(fused).engine == "fused"


def test_a_plan_for_another_policy_is_refused_unless_told_otherwise(policy: TinyPolicy) -> None:
    plan = plan_for(policy)
    expected = act(bacinfer.apply(policy, plan))
    with torch.no_grad():
        policy.model.time_emb.weight[9] += 1
    with pytest.raises(ValueError, match=r"made for another policy \(weights: .*for_this_policy=False"):
        bacinfer.apply(policy, plan)
    assert not torch.equal(act(policy), expected)
    bacinfer.apply(policy, plan, for_this_policy=False)


def test_what_is_no_plan_is_refused(policy: TinyPolicy, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="expected a SamplingPlan, a CacheSchedule or the path of a file, got int"):
        bacinfer.apply(policy, 3)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        bacinfer.apply(policy, tmp_path / "missing.json")
    with pytest.raises(ValueError, match="unknown engine 'warp'; there are auto, eager, onednn, fused, cuda_graph"):
        bacinfer.apply(policy, SamplingPlan(), engine="warp")
