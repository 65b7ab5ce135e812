"""Finding the fastest plan that loses nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

import bacinfer
from bacinfer import PolicyHandle, Sampler, SamplingPlan
from bacinfer.commands.calibrate import main
from bacinfer.core.apply import switch
from bacinfer.experiments import calibration, trials
from bacinfer.experiments.calibration import (
    FIRST_CONFIRMATION_SEED,
    Candidate,
    Target,
    calibrate,
    episodes_to_show,
    survivors,
)
from bacinfer.experiments.candidates import default_methods
from bacinfer.experiments.plans import make_plans
from bacinfer.experiments.schedules import found_at
from bacinfer.measurement.latency import Latency
from bacinfer.measurement.statistics import Estimate, estimate_paired_difference
from bacinfer.tasks import Rollout
from bacinfer.tasks.base import FIRST_TEST_SEED
from core.fused.fused_helpers import make_policy
from helpers import TinyPolicy, observation
from tiny_policies import observations

K = 10
LOSS = {1: 0.5, 2: 0.1, 3: 0.0, 5: 0.0, K: 0.0}  # of the score, by the number of denoising steps


class LossyTask:
    """Episodes whose score depends on the seed, on chance, and on the number of steps of what is applied."""

    name = "lossy"

    def __init__(self) -> None:
        self.episodes: list[tuple[int, int]] = []  # steps and seed
        self.fails_after: int | None = None

    def observations(self, policy: Any, demo_idx: int, count: int = 1) -> Iterator[dict[str, Tensor]]:
        yield observation(1, demo_idx)

    def rollout(self, policy: Any, seeds: Sequence[int], *, noise_seed: int = 0, **_: Any) -> Rollout:
        steps = bacinfer.summary(policy).num_inference_steps
        scores = {}
        for seed in seeds:
            if self.fails_after == len(self.episodes):
                raise KeyboardInterrupt
            self.episodes.append((steps, seed))
            chance = np.random.default_rng([seed, steps]).normal(scale=0.01) if steps != K else 0.0
            scores[f"test/sim_max_reward_{seed}"] = 0.8 - LOSS[steps] + chance
        return Rollout(scores, [0.1], 0.1)


@pytest.fixture(autouse=True)
def _latency_by_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which a step takes a millisecond, and the plain policy 30."""

    def measured(policy: Any, _: Any, variants: dict[str, Any], num_calls: int) -> dict[str, Latency]:
        found = {}
        for name, applied in variants.items():
            switch(policy, applied)
            seconds = 0.03 if not name else bacinfer.summary(policy).num_inference_steps / 1e3
            found[name] = Latency(seconds, seconds, seconds, num_calls)
        switch(policy, None)
        return found

    monkeypatch.setattr(trials, "measure_latencies", measured)


PLANS = {f"own:{n}": SamplingPlan(sampler=Sampler("own", n)) for n in (1, 2, 3, 5)}


def found_by(
    task: LossyTask, output_dir: Path, target: Target | None = None, **settings: Any
) -> calibration.Calibration:
    return calibrate(
        TinyPolicy(),
        task,
        output_dir,
        target or Target(),
        **{"plans": PLANS, "rounds": (8, 16), "num_fresh": 20, "on_round": lambda _: None, **settings},
    )


def test_the_fastest_plan_that_loses_nothing(tmp_path: Path) -> None:
    task = LossyTask()
    found = found_by(task, tmp_path)
    assert found.chosen.name == "own:3"
    assert found.loses_nothing
    assert found.chosen.speedup == 10
    assert SamplingPlan.load(tmp_path / "plan.json") == PLANS["own:3"]
    written = json.loads((tmp_path / "calibration.json").read_text())
    assert (written["chosen"], written["loses_nothing"]) == ("own:3", True)
    assert [row["name"] for row in written["candidates"]] == ["own:1", "own:2", "own:3", "own:5"]
    assert "own:3: 3.00 ms a call, 10 times the plain policy" in str(found)
    assert (found.plain.num_steps, found.plain.latency) == (K, 0.03)
    assert found.plain.score is not None
    assert found.plain.score.mean == pytest.approx(0.8)
    lines = str(found).splitlines()
    assert lines[0].split("|")[1:4] == [" plan  ", " steps ", " ms a call "]
    assert lines[6].split("|")[1:6] == [" plain ", "    10 ", "     30.00 ", "    1.0x ", "       16 "]
    # what is refuted, or slower and no better, runs no second round; the winner is confirmed on seeds of its own
    seeds = {steps: {seed for step, seed in task.episodes if step == steps} for steps in LOSS}
    assert (len(seeds[1]), len(seeds[2])) == (8, 8)
    assert len(seeds[3]) == len(seeds[K]) == 16 + 20
    assert min(seeds[K]) >= FIRST_TEST_SEED
    assert not seeds[K] & set(range(100_000, 101_000)), "test seeds choose nothing"


def test_a_plan_that_disappoints_runs_half_of_the_fresh_episodes(tmp_path: Path) -> None:
    class Disappointing(LossyTask):
        def rollout(self, policy: Any, seeds: Sequence[int], **settings: Any) -> Rollout:
            found = super().rollout(policy, seeds, **settings)
            three = bacinfer.summary(policy).num_inference_steps == 3 and min(seeds) >= FIRST_CONFIRMATION_SEED
            return replace(found, log={name: score - 0.1 * three for name, score in found.log.items()})

    task = Disappointing()
    found = found_by(task, tmp_path)
    assert (found.chosen.name, found.loses_nothing) == ("own:5", True)
    fresh = [steps for steps, seed in task.episodes if seed >= FIRST_CONFIRMATION_SEED]
    assert {steps: fresh.count(steps) for steps in fresh} == {K: 20, 3: 10, 5: 20}


def test_plans_in_half_precision_against_the_plain_policy_in_its_own(tmp_path: Path) -> None:
    precisions = set()

    class Asking(LossyTask):
        def observations(self, policy: Any, demo_idx: int, count: int = 1) -> Iterator[dict[str, Tensor]]:
            yield observations(1)

        def rollout(self, policy: Any, seeds: Sequence[int], **settings: Any) -> Rollout:
            found = bacinfer.summary(policy)
            precisions.add((found.num_inference_steps, found.precision))
            return super().rollout(policy, seeds, **settings)

    plans = {"own:3": PLANS["own:3"]}
    found = calibrate(
        make_policy(), Asking(), tmp_path, plans=plans, precision="bf16", rounds=(4,), num_fresh=4, on_round=print
    )
    assert precisions == {(K, None), (3, "bf16")}
    assert found.verdict.startswith("own:3 in bf16: ")
    assert json.loads((tmp_path / "calibration.json").read_text())["precision"] == "bf16"
    again = Asking()
    calibrate(make_policy(), again, tmp_path, plans=plans, rounds=(4,), num_fresh=4, on_round=print)
    assert {steps for steps, _ in again.episodes} == {3}, "the plain policy's episodes serve both"


def test_the_policy_is_left_as_it_was(tmp_path: Path) -> None:
    policy = bacinfer.apply(TinyPolicy(), PLANS["own:5"])
    before = vars(policy)["_bacinfer"]
    calibrate(policy, LossyTask(), tmp_path, plans=PLANS, rounds=(4,), num_fresh=4, on_round=lambda _: None)
    assert vars(policy)["_bacinfer"] is before


def test_what_was_measured_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted, task = LossyTask(), LossyTask()
    interrupted.fails_after = 50
    with pytest.raises(KeyboardInterrupt):
        found_by(interrupted, tmp_path)
    found = found_by(task, tmp_path)
    assert found.chosen == found_by(LossyTask(), tmp_path / "anew").chosen
    repeated = set(interrupted.episodes) & set(task.episodes)
    assert len(repeated) < 24, "but for the rollout that broke off"
    again = LossyTask()
    with monkeypatch.context() as patch:
        patch.setattr(trials, "measure_latencies", None)
        assert found_by(again, tmp_path) == found
    assert not again.episodes


def test_a_latency_that_is_asked_for(tmp_path: Path) -> None:
    found = found_by(LossyTask(), tmp_path, Target(latency=0.0025))
    assert (found.chosen.name, found.loses_nothing) == ("own:2", False)
    assert "does not show that it loses less than 0.02" in found.verdict
    with pytest.raises(ValueError, match=r"no plan takes 0.5 ms .* nearest is own:1 with 1 ms \(1000 calls a second\)"):
        found_by(LossyTask(), tmp_path, Target(latency=0.0005))


def test_where_nothing_is_good_enough_the_best_one_is_named_as_such(tmp_path: Path) -> None:
    found = found_by(LossyTask(), tmp_path, plans={name: PLANS[name] for name in ("own:1", "own:2")})
    assert (found.chosen.name, found.loses_nothing) == ("own:2", False)


def test_how_many_episodes_would_show_it() -> None:
    def found(mean: float, low: float | None) -> int | None:
        return episodes_to_show(Estimate(mean, 0.01, low, None, 200), 0.02)

    assert found(-0.01, -0.03) == 800, "an interval of half the length takes four times as many"
    assert found(0.01, -0.021) == 300, "in hundreds"
    assert found(-0.02, -0.04) is found(-0.03, -0.05) is found(0.01, None) is None
    lost = replace(judged("own:10", 1, -0.01, spread=0.1), confirmed=Estimate(-0.01, 0.01, -0.03, 0.01, 200))
    verdict = calibration.Calibration(lost, (lost,), lost, Target()).verdict
    assert verdict.endswith("less than 0.02; about 800 would, if the difference stayed what it is")


def judged(name: str, latency: float, difference: float, spread: float = 0.01) -> Candidate:
    zeros, values = [0.0] * 4, [difference + spread * sign for sign in (-1, 1, -1, 1)]
    found = estimate_paired_difference(zeros, values)
    return Candidate(name, SamplingPlan(), latency, 1 / latency, 1, difference=found)


def test_who_goes_on() -> None:
    candidates = [
        judged("refuted", 1, -0.3),
        judged("fast", 2, -0.05, spread=0.1),
        judged("good", 3, 0.0),
        judged("second", 4, -0.05, spread=0.1),
        judged("slower and no better", 5, -0.05, spread=0.1),
    ]
    assert [candidate.name for candidate in survivors(candidates, Target())] == ["fast", "good", "second"]
    by_score = survivors(candidates, Target(latency=9))
    assert [candidate.name for candidate in by_score] == ["good", "fast", "second"]
    assert [candidate.name for candidate in survivors(candidates[:1], Target())] == ["refuted"]


def test_caches_are_tried_where_they_have_a_place() -> None:
    policy = make_policy()
    policy.num_inference_steps = 20
    assert caches_tried(policy) == {"bac:10:5", "own:20+bac:7:5", "own:10+uniform:5"}
    policy.model.decoder.layers = policy.model.decoder.layers[:1]
    assert caches_tried(policy) == {"own:10+uniform:5"}, "three blocks are too few for BU 5"


def caches_tried(policy: Any) -> set[str]:
    return {method.spec for method in default_methods(policy, stateful=False) if method.cache != "plain"}


def test_a_handle_gets_what_it_can_take() -> None:
    policy = make_policy()
    parts = policy.model, K, (policy, "predict_action")
    assert not default_methods(PolicyHandle(*parts), stateful=False), "other numbers of steps need num_steps"
    steps = {"num_steps": (policy, "num_inference_steps")}
    own = {method.spec for method in default_methods(PolicyHandle(*parts, **steps), stateful=False)}
    assert {"own:5", "own:10+uniform:5"} <= own
    both = PolicyHandle(*parts, **steps, scheduler=(policy, "noise_scheduler"))
    methods = {method.spec for method in default_methods(both, stateful=False)}
    assert methods == {method.spec for method in default_methods(policy, stateful=False)} > own
    with pytest.raises(ValueError, match="calibrate it without stateful"):
        default_methods(both, stateful=True)


def test_default_methods_fit_the_policy() -> None:
    policy = make_policy()
    methods = default_methods(policy, stateful=True)
    plans = make_plans(policy, methods, found_at([observations(1)]))
    assert {"own:5", "dpm:3", "ddim:10+warm:4:3", "own:10+uniform:5"} <= plans.keys()
    for plan in plans.values():
        bacinfer.apply(policy, plan, stateful=True)
    assert not any("warm" in method.spec for method in default_methods(policy, stateful=False))
    assert {method.spec for method in default_methods(TinyPolicy(), stateful=True)} >= {"own:5", "own:2"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": ()}, "rounds of more and more episodes"),
        ({"rounds": (8, 8)}, "rounds of more and more episodes"),
        ({"num_fresh": 1}, "rounds of more and more episodes"),
        ({"target": {"margin": 0.0}}, "margin must be above 0"),
        ({"target": {"latency": -1.0}}, "latency must be above 0"),
    ],
)
def test_what_cannot_be_asked_for(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        found_by(LossyTask(), tmp_path, Target(**arguments.pop("target", {})), **arguments)


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_on_a_checkpoint(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = "--methods=own:5,ddim:2,ddim:5+warm:4:2,own:6+bac:3:1"
    command = ["-c", str(checkpoint), "-o", str(tmp_path), "--rounds=3,5", "--fresh=4", methods]
    assert main(command) == 2
    assert "add --stateful if that is meant" in capsys.readouterr().err
    assert main([*command, "--stateful"]) == 0
    output = capsys.readouterr().out
    assert "after 3 episodes" in output
    assert str(tmp_path / "plan.json") in output
    page = (tmp_path / "calibration.html").read_text()
    assert "<svg" in page
    assert "ddim:5+warm:4:2:" in page or "ddim:5+warm:4:2" in page
    plan = SamplingPlan.load(tmp_path / "plan.json")
    policy = bacinfer.load_policy(checkpoint)
    bacinfer.apply(policy, plan, stateful=True)
    policy.predict_action(observations(1))


def test_warm_starts_get_a_threshold(checkpoint: Path, tmp_path: Path) -> None:
    command = ["-c", str(checkpoint), "-o", str(tmp_path), "--rounds=3", "--fresh=3", "--stateful"]
    assert main([*command, "--methods=ddim:5+warm:4:2"]) == 0
    plan = SamplingPlan.load(tmp_path / "plan.json")
    assert plan.warm_start is not None
    assert plan.warm_start.max_disagreement is not None
    assert 0 < plan.warm_start.max_disagreement < 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods=own:99"], "trained with 10 timesteps, which own:99 exceeds"),
        (["--frequency=-1"], "expected a number above 0"),
        (["--methods=taylor:3"], "there is no such method"),
        (["--latency_ms=0"], "latency must be above 0"),
    ],
)
def test_mistakes(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(["-c", str(checkpoint), "-o", str(tmp_path), *flags]) == 2
    assert message in capsys.readouterr().err
