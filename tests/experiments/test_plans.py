"""From a method to its plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bacinfer
from bacinfer import Sampler
from bacinfer.analysis.find_plan import observe_statistics
from bacinfer.analysis.recorded import read_matrices
from bacinfer.analysis.update_steps import optimal_update_steps
from bacinfer.assets import (
    RunAssets,
    read_block_errors,
    read_schedule,
    write_by_block,
    write_schedules,
)
from bacinfer.core.apply import summary
from bacinfer.core.bubbling import bubbling_union, select_blocks
from bacinfer.core.plan import SamplingPlan
from bacinfer.core.schedule import CacheSchedule
from bacinfer.experiments import schedules
from bacinfer.experiments.method import parse_method
from bacinfer.experiments.plans import applied, make_plan, make_plans
from bacinfer.experiments.schedules import ScheduleAssets, analysis_observations, found_at
from bacinfer.files import read_json, write_json
from bacinfer.tasks import PushTTask
from helpers import act
from small_experiments import MAX_STEPS
from tiny_policies import K, observations

TASK = PushTTask(max_steps=MAX_STEPS)


@pytest.fixture
def assets(tmp_path: Path) -> ScheduleAssets:
    return ScheduleAssets("digest", tmp_path / "found")


def schedule(policy: Any, spec: str, assets: ScheduleAssets) -> CacheSchedule:
    plan = make_plan(policy, parse_method(spec), assets.schedules(TASK))
    assert plan.cache is not None
    return plan.cache


def steps_of_all(found: CacheSchedule) -> tuple[int, ...]:
    (steps,) = set(found.update_steps.values())
    return steps


# -- schedules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "steps"),
    [
        ("uniform:3", (0, 4, 8)),
        ("uniform:10", tuple(range(10))),
        ("threshold:7", (0, 7)),
        ("edit:0-3-9", (0, 3, 9)),
        ("ddim:5+uniform:2", (0, 3)),
    ],
)
def test_the_same_steps_for_all_blocks(
    pusht_policy: Any, assets: ScheduleAssets, spec: str, steps: tuple[int, ...]
) -> None:
    assert steps_of_all(schedule(pusht_policy, spec, assets)) == steps
    assert not assets.found_dir.exists()


def test_plain_and_ddim_need_no_engine(pusht_policy: Any, assets: ScheduleAssets) -> None:
    for spec, num_steps in (("plain", K), ("ddim:4", 4), ("own:4", 4)):
        method = parse_method(spec)
        plan = make_plan(pusht_policy, method, assets.schedules(TASK))
        with applied(pusht_policy, method, plan, "eager", None):
            assert summary(pusht_policy).engine is None
            assert pusht_policy.num_inference_steps == num_steps
    with applied(pusht_policy, parse_method("warm:3:2"), SamplingPlan(), "eager", None):
        assert summary(pusht_policy).engine == "eager"


def test_a_warm_start_comes_with_the_cache_of_its_steps(pusht_policy: Any, assets: ScheduleAssets) -> None:
    method = parse_method("own:6+warm:4:4:0.5+uniform:2")
    plan = make_plan(pusht_policy, method, assets.schedules(TASK))
    assert plan.cache is not None
    assert plan.warm_start is not None
    assert plan.warm_start.cache is not None
    assert plan.warm_start.max_disagreement == 0.5
    assert steps_of_all(plan.cache) == (0, 3)
    assert steps_of_all(plan.warm_start.cache) == (0, 2)


@pytest.mark.parametrize("spec", ["unified:4", "unified:4:l1", "ddim:6+unified:3"])
def test_unified_is_acs_on_the_mean_similarity(pusht_policy: Any, assets: ScheduleAssets, spec: str) -> None:
    method = parse_method(spec)
    found = steps_of_all(schedule(pusht_policy, spec, assets))
    run = assets.of(method)
    assert run is not None
    matrices = read_matrices(run, method.metric or "")
    mean = sum(matrices.values()) / len(matrices)
    num_steps = K if method.sampler is None else method.sampler.num_steps
    assert mean.shape == (num_steps, num_steps)
    (expected,) = optimal_update_steps(mean, [method.num_caches or 0], maximise=method.metric == "cosine").values()
    assert found == tuple(sorted({*expected, num_steps - 1}))


def test_what_assets_lack_is_found_from_the_policy(pusht_policy: Any, assets: ScheduleAssets) -> None:
    blockwise, bac = (schedule(pusht_policy, spec, assets) for spec in ("blockwise:3", "bac:3:2"))
    run = RunAssets(assets.found_dir / "original")
    for block, matrix in read_matrices(run, "cosine").items():
        (steps,) = optimal_update_steps(matrix, [3], maximise=True).values()
        assert blockwise.update_steps[block] == tuple(sorted({*steps, K - 1}))
    union = bubbling_union(blockwise, select_blocks(read_block_errors(run), 2))
    assert bac.update_steps == union.update_steps

    on_ddim = schedule(pusht_policy, "ddim:5+bac:2:1", assets)
    assert on_ddim.num_inference_steps == 5
    assert RunAssets(assets.found_dir / "ddim_5").similarity_matrices.is_file()
    method = parse_method("ddim:5+bac:2:1")
    plan = make_plan(pusht_policy, method, assets.schedules(TASK))
    with applied(pusht_policy, method, plan, "eager", None):
        assert summary(pusht_policy).schedule == on_ddim
        act(pusht_policy, observations())
    assert summary(pusht_policy).mode == "original"


def test_a_plan_is_for_the_policy_that_it_was_made_for(pusht_policy: Any, assets: ScheduleAssets) -> None:
    method = parse_method("ddim:5+uniform:2")
    plan = make_plan(pusht_policy, method, assets.schedules(TASK))
    assert plan.made_for is not None
    assert (plan.made_for.num_inference_steps, plan.made_for.scheduler["class"]) == (K, "DDPMScheduler")
    pusht_policy.num_inference_steps = 7
    with pytest.raises(ValueError, match="made for another policy"):
        applied(pusht_policy, method, plan, "eager", None).__enter__()
    assert summary(pusht_policy).mode == "original"


@pytest.mark.parametrize(
    ("spec", "path"), [("sens:3", "original/sensitive/3.json"), ("own:5+sens:2.5", "own_5/sensitive/2.5.json")]
)
def test_a_schedule_by_derivatives_is_found_once(
    pusht_policy: Any, assets: ScheduleAssets, monkeypatch: pytest.MonkeyPatch, spec: str, path: str
) -> None:
    method = parse_method(spec)
    found = schedule(pusht_policy, spec, assets)
    seen = analysis_observations(pusht_policy, TASK)
    expected = bacinfer.find_sensitive_plan(pusht_policy, seen, method.budget or 0, sampler=method.sampler)
    assert found == expected.cache

    taken = []
    monkeypatch.setattr(schedules, "find_sensitive_schedule", lambda *_: taken.append(1) or found)
    assert schedule(pusht_policy, spec, assets) == found
    assert not taken
    stored = read_json(assets.found_dir / path)
    write_json(assets.found_dir / path, stored | {"digest": "of other demos"})
    assert schedule(pusht_policy, spec, assets) == found
    assert taken == [1]
    assert read_json(assets.found_dir / path) == stored

    others = stored["schedule"] | {"update_steps": {"other.layers.0_sa_block": [0]}}
    write_json(assets.found_dir / path, stored | {"schedule": others})
    assert schedule(pusht_policy, spec, assets) == found
    assert taken == [1, 1]
    for damaged in ([], {"digest": stored["digest"]}, stored | {"schedule": {"version": 99}}):
        write_json(assets.found_dir / path, damaged)
        with pytest.raises(ValueError, match=rf"{path}: expected a schedule and its digest, found"):
            schedule(pusht_policy, spec, assets)


def test_a_budget_above_the_number_of_steps(pusht_policy: Any, assets: ScheduleAssets) -> None:
    with pytest.raises(ValueError, match=r"budget must be a number in 1\.\.5 .*got 6\.0"):
        schedule(pusht_policy, "own:5+sens:6", assets)
    assert not assets.found_dir.exists()


def test_what_a_schedule_by_derivatives_depends_on(assets: ScheduleAssets) -> None:
    assert "probes" in assets.digest(parse_method("sens:3"))
    assert assets.digest(parse_method("sens:3")) != assets.digest(parse_method("bac:3:1"))
    assert assets.of(parse_method("sens:3")) is None


def test_schedules_of_given_observations_are_those_that_the_door_finds(pusht_policy: Any) -> None:
    seen = [observations(1), observations(2)]
    specs = ("own:6+bac:3:1", "blockwise:3:l1", "own:6+sens:2", "unified:3")
    bac, blockwise, sens, unified = make_plans(pusht_policy, map(parse_method, specs), found_at(seen)).values()
    assert bac == bacinfer.find_plan(pusht_policy, seen, 3, 1, sampler=Sampler("own", 6))
    assert blockwise == bacinfer.find_plan(pusht_policy, seen, 3, 0, "l1")
    assert sens == bacinfer.find_sensitive_plan(pusht_policy, seen, 2, sampler=Sampler("own", 6))
    matrices = observe_statistics(pusht_policy, seen, "cosine").matrices("cosine")
    (expected,) = optimal_update_steps(np.mean(list(matrices.values()), axis=0), [3], maximise=True).values()
    assert unified.cache is not None
    assert steps_of_all(unified.cache) == tuple(sorted({*expected, K - 1}))


def test_an_interrupted_analysis_is_not_taken_for_a_whole_one(pusht_policy: Any, assets: ScheduleAssets) -> None:
    before = schedule(pusht_policy, "blockwise:3", assets)
    steps_dir = RunAssets(assets.found_dir / "original").steps_dir("cosine")
    whole = read_schedule(steps_dir, 3, "cosine")
    assert whole is not None
    cut = dict(list(whole.update_steps.items())[1:])
    write_schedules(steps_dir, [replace(whole, update_steps=cut)])
    assert schedule(pusht_policy, "blockwise:3", assets) == before


def test_given_assets_come_first(pusht_policy: Any, assets: ScheduleAssets, steps_dir: Path) -> None:
    given = ScheduleAssets("digest", assets.found_dir, RunAssets.of_steps_dir(steps_dir))
    assert steps_of_all(schedule(pusht_policy, "blockwise:3", given)) == (0, 2, 6, K - 1)
    assert not assets.found_dir.exists()
    assert schedule(pusht_policy, "blockwise:4", given) == schedule(pusht_policy, "blockwise:4", assets)
    assert given.digest(parse_method("blockwise:4")) == assets.digest(parse_method("blockwise:4"))
    assert given.digest(parse_method("blockwise:3")) != assets.digest(parse_method("blockwise:3"))


def test_a_steps_directory_is_all_there_is(pusht_policy: Any, assets: ScheduleAssets, steps_dir: Path) -> None:
    strict = ScheduleAssets("digest", assets.found_dir, steps_dir=steps_dir)
    assert steps_of_all(schedule(pusht_policy, "blockwise:3", strict)) == (0, 2, 6, K - 1)
    with pytest.raises(FileNotFoundError, match=r"with 4 caches .* it has those for cosine 3, cosine 5"):
        schedule(pusht_policy, "blockwise:4", strict)


def test_another_policys_matrices(pusht_policy: Any, assets: ScheduleAssets, tmp_path: Path) -> None:
    run = RunAssets(tmp_path / "original")
    block = "decoder.layers.0_sa_block"
    write_by_block(run.similarity_matrices, {f"{block}/cosine": np.eye(5)}, [block])
    with pytest.raises(ValueError, match="K = 5, this one has K = 10"):
        schedule(pusht_policy, "unified:3", ScheduleAssets("digest", assets.found_dir, run))
