"""From a configuration to its row: keys, what is kept, what an interruption and a second process do."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bacinfer.assets import write_block_steps
from bacinfer.core.plan import Fingerprint, SamplingPlan
from bacinfer.experiments import experiment as module
from bacinfer.experiments.experiment import Experiment, run, run_all
from bacinfer.experiments.method import PLAIN, parse_method
from bacinfer.experiments.run_files import read_plain_result
from bacinfer.experiments.store import ResultsStore
from bacinfer.policies import load_policy
from bacinfer.tasks import PushTTask, Rollout
from tiny_policies import K


@pytest.fixture
def asked(checkpoint: Path) -> Experiment:
    return Experiment(checkpoint=str(checkpoint), method=parse_method("uniform:5"), n_test=2, latency_calls=2)


def keys(results_dir: Path) -> list[str]:
    return [row.method for row in ResultsStore(results_dir).rows()]


# -- keys --------------------------------------------------------------------------------------------------------


def test_a_key_is_stable(asked: Experiment, tmp_path: Path) -> None:
    assert asked.key == replace(asked).key
    assert len(asked.key) == 16
    copy = shutil.copy(asked.checkpoint, tmp_path / "elsewhere.ckpt")
    assert replace(asked, checkpoint=str(copy)).key == asked.key  # the content counts


@pytest.mark.parametrize(
    "change",
    [
        {"method": parse_method("uniform:4")},
        {"n_test": 3},
        {"first_episode_seed": 5},
        {"noise_seed": 1},
        {"n_envs": 1},
        {"disturb": True},
        {"latency_calls": 3},
        {"engine": "fused"},
        {"precision": "bf16"},
        {"training_seed": 0},
        {"checkpoint_type": "max"},
    ],
)
def test_a_key_depends_on_everything(asked: Experiment, change: dict[str, Any]) -> None:
    assert replace(asked, **change).key != asked.key


def test_a_key_depends_on_the_schedule_that_is_read(asked: Experiment, steps_dir: Path, tmp_path: Path) -> None:
    method = parse_method("blockwise:3")
    found = replace(asked, method=method)
    given = replace(found, optimal_steps_dir=str(steps_dir))
    changed = shutil.copytree(steps_dir, tmp_path / "original" / "optimal_steps" / "cosine")
    same = replace(found, optimal_steps_dir=str(changed))
    assert given.key == same.key != found.key
    block = "decoder.layers.0_sa_block"
    write_block_steps(changed, block, "cosine", [0, 1, 2, 3], K)
    assert given.key == same.key  # another number of updates is another method
    write_block_steps(changed, block, "cosine", [0, 1, 2], K)
    assert same.key != given.key


def test_a_plain_run_serves_all_caches(asked: Experiment, steps_dir: Path) -> None:
    plain = replace(asked, method=PLAIN)
    assert replace(plain, engine="fused", optimal_steps_dir=str(steps_dir)).key == plain.key


# -- runs --------------------------------------------------------------------------------------------------------


def test_a_run_and_its_files(asked: Experiment, tmp_path: Path) -> None:
    row = run(asked, tmp_path)
    assert keys(tmp_path) == ["plain", "uniform:5"]
    assert ResultsStore(tmp_path).find(asked.key) == row
    directory = tmp_path / row.directory
    plan = SamplingPlan.load(directory / "plan.json")
    assert plan.cache is not None
    assert plan.cache.num_inference_steps == K
    assert plan.made_for == Fingerprint.of(load_policy(asked.checkpoint))
    scores = json.loads((directory / "scores.json").read_text())["scores"]
    assert sorted(scores) == ["100000", "100001"]
    assert row.score == pytest.approx(sum(scores.values()) / 2)
    configuration = json.loads((directory / "configuration.json").read_text())
    assert configuration == asked.configuration
    assert (row.method, row.label, row.num_caches, row.mean_updates) == ("uniform:5", "uniform 5", 5, 5.0)
    assert row.speedup == row.plain_latency_p50 / row.latency_p50
    assert 0 < row.flops_fraction < 1
    assert row.noise_error > 0
    assert row.action_error_low is not None
    assert row.action_error_low <= row.action_error

    plain = ResultsStore(tmp_path).rows()[0]
    assert (plain.speedup, plain.action_error, plain.score_difference, plain.assets) == (1, 0, 0, None)
    assert (plain.score_difference_low, plain.score_difference_high) == (None, None)
    stored = read_plain_result(tmp_path / plain.directory)
    assert stored.result.cost.flops == plain.flops
    assert not (tmp_path / plain.directory / "plan.json").exists()


def test_a_disturbed_run_is_compared_with_a_disturbed_plain_one(
    asked: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts: list[bool] = []
    whole = PushTTask.rollout

    def noted(*args: Any, **options: Any) -> Rollout:
        rollouts.append(options.get("disturb", False))
        return whole(*args, **options)

    monkeypatch.setattr(PushTTask, "rollout", noted)
    monkeypatch.setattr(PushTTask, "disturbed_before", range(2, 20))  # the episodes of these tests are short
    run(asked, tmp_path)
    assert rollouts == [False, False]
    row = run(replace(asked, disturb=True), tmp_path)
    assert rollouts == [False, False, True, True]  # nothing of the undisturbed runs was taken
    undisturbed, other, *disturbed = ResultsStore(tmp_path).rows()
    assert [each.disturb for each in (undisturbed, other, *disturbed)] == [False, False, True, True]
    assert disturbed[1] == row
    assert json.loads((tmp_path / row.directory / "configuration.json").read_text())["disturb"] is True
    assert run(replace(asked, disturb=True), tmp_path) == row


def test_what_cannot_be_disturbed_is_refused_before_anything_slow(
    asked: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PushTTask, "disturbed_before", range(0))
    with pytest.raises(ValueError, match=r"task pusht cannot be disturbed.* leave out --disturb"):
        module.check([replace(asked, disturb=True)], tmp_path / "results")
    (outcome,) = run_all([replace(asked, disturb=True)], tmp_path / "results")
    assert (outcome.status, "cannot be disturbed" in outcome.detail) == ("failed", True)
    module.check([asked], tmp_path / "results")


def test_schedules_that_were_found_lie_in_the_results(asked: Experiment, tmp_path: Path) -> None:
    row = run(replace(asked, method=parse_method("bac:3:1")), tmp_path)
    assert row.assets is not None
    assert row.assets.startswith("assets/tiny-")
    assert (tmp_path / row.assets / "similarity_matrices.npz").is_file()
    assert (tmp_path / row.assets / "block_errors.json").is_file()


def test_an_interrupted_run_is_run_again(asked: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run(replace(asked, method=PLAIN), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_results", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_all([asked], tmp_path)
    assert keys(tmp_path) == ["plain"]
    assert [outcome.status for outcome in run_all([replace(asked, method=PLAIN), asked], tmp_path)] == [
        "kept",
        "evaluated",
    ]
    assert ResultsStore(tmp_path).rows()[0] == plain


def test_an_interrupted_forced_run_leaves_no_row(
    asked: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row would be that of other files than those that lie beside it."""
    plain = replace(asked, method=PLAIN)
    row = run(plain, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(plain, tmp_path, force=True)
    assert ResultsStore(tmp_path).rows() == [row]  # no file was written yet
    monkeypatch.setattr(module, "write_results", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(plain, tmp_path, force=True)
    assert ResultsStore(tmp_path).rows() == []


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_a_failure_does_not_stop_the_others(asked: Experiment, tmp_path: Path) -> None:
    wrong = replace(asked, method=parse_method("uniform:11"))
    outcomes = run_all([wrong, asked], tmp_path)
    assert [outcome.status for outcome in outcomes] == ["failed", "evaluated"]
    assert "num_caches must be an integer in 1..10" in outcomes[0].detail
    assert keys(tmp_path) == ["plain", "uniform:5"]


def test_a_failed_run_of_the_plain_policy_is_not_run_again(
    asked: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts: list[Any] = []

    def fail(*_: Any, **__: Any) -> Rollout:
        rollouts.append(_)
        raise RuntimeError("no kitchen")

    monkeypatch.setattr(PushTTask, "rollout", fail)
    others = [replace(asked, method=parse_method(f"uniform:{M}")) for M in (3, 4)]
    outcomes = run_all([replace(asked, method=PLAIN), *others], tmp_path / "plain first")
    assert len(rollouts) == 1
    assert [outcome.detail for outcome in outcomes] == [
        "no kitchen",
        *["the plain policy, which it is compared with, failed: no kitchen"] * 2,
    ]
    outcomes = run_all(others, tmp_path / "plain implied")
    assert len(rollouts) == 2
    assert {outcome.detail for outcome in outcomes} == {
        "the plain policy, which it is compared with, failed: no kitchen"
    }
    run_all([replace(asked, first_episode_seed=7)], tmp_path / "plain implied")
    assert len(rollouts) == 3  # another plain run


def run_there(asked: Experiment, results_dir: Path) -> None:
    run(asked, results_dir)


def test_two_processes_share_one_run(asked: Experiment, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=run_there, args=(asked, tmp_path)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert sorted(keys(tmp_path)) == ["plain", "uniform:5"]


def test_damaged_results_of_the_plain_policy(asked: Experiment, tmp_path: Path) -> None:
    plain = run(replace(asked, method=PLAIN), tmp_path)
    (tmp_path / plain.directory / "benchmark_results.json").write_text("{}")
    with pytest.raises(ValueError, match=f"{plain.directory} is damaged"):
        run(asked, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_test": 0}, "--n_test 0"),
        ({"n_envs": 0}, "--n_envs 0"),
        ({"noise_seed": -1}, "--noise_seed -1 is negative"),
        ({"device": "warp:9"}, "warp:9"),
    ],
)
def test_impossible_experiments(asked: Experiment, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(asked, **settings)


# -- rows --------------------------------------------------------------------------------------------------------


def test_sub_tasks_have_intervals(asked: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kitchen's runner reports them: no episode's score, but shares of the episodes."""
    rollout = Rollout({"test/mean_score": float("nan"), "test/p_1": 0.5, "test/p_2": 0.0}, [0.1], 0.1)
    monkeypatch.setattr(PushTTask, "rollout", lambda *_, **__: rollout)
    row = run(replace(asked, n_test=10), tmp_path)
    assert (row.score, row.score_low, row.score_difference) == (None, None, None)
    assert row.sub_scores is not None
    subs = row.sub_scores
    assert list(subs) == ["p_1", "p_2"]
    low, high = subs["p_1"]["interval_95"]
    assert 0.2 < low < 0.5 < high < 0.8
    assert json.loads((tmp_path / row.directory / "eval_results.json").read_text())["mean_score"] is None


def test_crashed_environments_are_named(asked: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = PushTTask.rollout

    def crash_one(self: PushTTask, policy: Any, seeds: Any, **options: Any) -> Rollout:
        rollout = whole(self, policy, seeds[:1], **options)
        object.__setattr__(rollout, "failures", {seeds[1]: "simulator crashed"})
        return rollout

    monkeypatch.setattr(PushTTask, "rollout", crash_one)
    row = run(asked, tmp_path)
    assert row.num_failed == 1
    stored = json.loads((tmp_path / row.directory / "scores.json").read_text())
    assert stored["failures"] == {"100001": "simulator crashed"}
    assert list(stored["scores"]) == ["100000"]
