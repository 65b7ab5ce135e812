"""The evaluation command from a checkpoint to its files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stand_in_runner
from bacinfer.commands.eval import main
from bacinfer.core.diffusion_cache_wrapper import FastDiffusionPolicy
from bacinfer.core.plan import SamplingPlan
from bacinfer.experiments import evaluation as comparison
from bacinfer.experiments.evaluation import calibration_observations, evaluate
from bacinfer.experiments.method import Method, parse_method
from bacinfer.experiments.plans import make_plan
from bacinfer.experiments.schedules import found_at
from bacinfer.experiments.store import ResultsStore
from bacinfer.report.page import write_report
from bacinfer.report.video import side_by_side
from bacinfer.tasks import PushTTask
from bacinfer.tasks.video import frame_rate, open_video, read_video
from small_experiments import MAX_STEPS
from tiny_policies import K, write_tiny_checkpoint

REPOSITORY = Path(__file__).parents[2]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(), parse_constant=pytest.fail)  # no NaN, which JSON does not have


@pytest.fixture
def arguments(checkpoint: Path, tmp_path: Path) -> list[str]:
    output_dir = tmp_path / "results" / "pusht"
    return [f"--checkpoint={checkpoint}", f"--output_dir={output_dir}", "--n_test=2", "--latency_calls=3"]


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    return tmp_path / "results" / "pusht"


def test_files_of_an_evaluation(
    arguments: list[str], output_dir: Path, steps_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = ["--cache_mode=optimal", f"--optimal_steps_dir={steps_dir}", "--num_caches=3", "--metric=cosine"]
    assert main([*arguments, *cache, "--skip_video"]) == 0
    assert {"benchmark_results.json", "eval_results.json", "fast_eval_log.json"} < {
        p.name for p in output_dir.iterdir()
    }
    results = read(output_dir / "eval_results.json")
    assert set(results) == {"mean_score", "speedup", "flops", "frequency", "cache_mode", "num_caches", "num_bu_blocks"}
    assert (results["cache_mode"], results["num_caches"], results["num_bu_blocks"]) == ("optimal", 3, 0)

    log = read(output_dir / "fast_eval_log.json")
    assert set(log) == {"test/sim_max_reward_100000", "test/sim_max_reward_100001", "test/mean_score"}
    assert log["test/mean_score"] == results["mean_score"]

    benchmark = read(output_dir / "benchmark_results.json")
    original, fast = benchmark["original"], benchmark["fast"]
    assert benchmark["speedup"] == results["speedup"] == original["latency_p50"] / fast["latency_p50"]
    assert fast["frequency"] == pytest.approx(8 / fast["latency_p50"])
    assert 0 < benchmark["flops_fraction"] < 1
    assert fast["flops"] == results["flops"] == benchmark["flops_fraction"] * original["flops"]
    assert 0 < benchmark["action_error"] < 2
    assert original["score"]["count"] == fast["score"]["count"] == benchmark["score_difference"]["count"] == 2
    assert fast["score"]["mean"] == pytest.approx(results["mean_score"])
    assert benchmark["task"] == "pusht"
    assert benchmark["num_inference_steps"] == K
    assert benchmark["settings"]["first_episode_seed"] == 100_000
    assert benchmark["hardware"]["batch_size"] == 1
    assert 0 < fast["latency_p50"] <= fast["latency_p95"] <= fast["latency_p99"]
    assert benchmark["peak_memory"] > 1e6
    assert benchmark["config"]["task"]["env_runner"]["max_steps"] == MAX_STEPS

    printed = capsys.readouterr().out
    assert "plain" in printed
    assert "block-wise ACS 3" in printed
    assert "score difference, paired over 2 seeds" in printed
    assert "where all pairs are equal, what so many leave open: the rule of three" in printed
    assert sorted(row.method for row in ResultsStore(output_dir).rows()) == ["blockwise:3", "plain"]


def test_original_evaluates_the_plain_policy_alone(arguments: list[str], output_dir: Path) -> None:
    assert main([*arguments, "--skip_video", "--seed=7"]) == 0
    results = read(output_dir / "eval_results.json")
    assert (results["cache_mode"], results["speedup"], results["num_caches"]) == ("original", 1.0, None)
    benchmark = read(output_dir / "benchmark_results.json")
    assert benchmark["original"] == benchmark["fast"]
    assert benchmark["action_error"] == 0
    assert set(read(output_dir / "fast_eval_log.json")) == {
        "train/sim_max_reward_7",
        "train/sim_max_reward_8",
        "train/mean_score",
    }


@pytest.mark.parametrize(
    ("cache", "method", "cache_mode", "steps"),
    [
        (["--engine=fused"], "lossless", "original", range(K)),
        (["--cache_mode=threshold", "--num_caches=3"], "uniform:3", "threshold", (0, 4, 8)),
        (["--cache_mode=edit", "--edit_steps=0,4"], "edit:0-4", "edit", (0, 4)),
    ],
)
def test_the_record_says_what_was_asked_and_what_was_run(
    arguments: list[str], output_dir: Path, cache: list[str], method: str, cache_mode: str, steps: Sequence[int]
) -> None:
    assert main([*arguments, "--skip_video", "--n_test=1", "--latency_calls=1", *cache]) == 0
    assert read(output_dir / "eval_results.json")["cache_mode"] == cache_mode
    assert read(output_dir / "benchmark_results.json")["method"] == method
    (row,) = (row for row in ResultsStore(output_dir).rows() if row.method != "plain")
    plan = SamplingPlan.load(output_dir / row.directory / "plan.json")
    assert plan.cache is not None
    assert set(plan.cache.update_steps.values()) == {tuple(steps)}


def test_a_directory_of_steps_is_used_without_a_mode(arguments: list[str], output_dir: Path, steps_dir: Path) -> None:
    cache = [f"--optimal_steps_dir={steps_dir}", "--num_caches=3"]
    assert main([*arguments, "--skip_video", "--n_test=1", "--latency_calls=1", *cache]) == 0
    results = read(output_dir / "eval_results.json")
    assert (results["cache_mode"], results["num_caches"]) == ("optimal", 3)


def test_videos(arguments: list[str], output_dir: Path) -> None:
    assert main([*arguments, "--n_test=1", "--cache_mode=threshold", "--num_caches=3"]) == 0
    assert read(output_dir / "benchmark_results.json")["method"] == "uniform:3"
    runs = [output_dir / row.directory for row in ResultsStore(output_dir).rows()]
    assert set(output_dir.rglob("*.mp4")) == {
        output_dir / "media" / "side_by_side.mp4",
        *(directory / "media" / "100000.mp4" for directory in runs),
    }
    frames = list(read_video(output_dir / "media" / "side_by_side.mp4"))
    assert len(frames) == MAX_STEPS + 1
    assert frames[0].shape == (384 + 32, 2 * 384, 3)


def test_baselines_stand_in_the_same_table(
    arguments: list[str], output_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threshold = ["--cache_mode=threshold", "--cache_threshold=4", "--skip_video"]
    assert main([*arguments, *threshold, "--baselines=ddim:4,uniform:3,blockwise:3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    labels = ["plain", "every 4", "DDIM 4", "uniform 3", "block-wise ACS 3"]
    assert [line[: len(label)] for line, label in zip(lines[2:], labels, strict=False)] == labels
    rows = {row.method: row for row in ResultsStore(output_dir).rows()}
    assert rows["ddim:4"].num_inference_steps == 4
    assert rows["ddim:4"].flops == rows["plain"].flops * 4 / K
    assert rows["uniform:3"].flops == rows["threshold:4"].flops
    assert rows["uniform:3"].score_difference == rows["threshold:4"].score_difference  # (equal schedules)
    assert read(output_dir / "eval_results.json")["cache_mode"] == "threshold"


def test_run_again_keeps_what_is_there(
    arguments: list[str], output_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*arguments, "--cache_mode=threshold", "--skip_video"]
    assert main(command) == 0
    first = ResultsStore(output_dir).rows()
    assert main([*command, "--baselines=ddim:4"]) == 0
    assert ResultsStore(output_dir).rows()[:2] == first
    assert "kept" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0
    assert ResultsStore(output_dir).rows()[0].latency_p50 != first[0].latency_p50


def test_videos_of_a_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Diffusion Policy's runners film in their own way: names of chance, 12.5 frames a second, a log of paths."""
    stand_in_runner.install(monkeypatch)
    runner = [f"task.env_runner._target_={stand_in_runner.STAND_IN_RUNNER}", "+task.env_runner.obs_dim=20"]
    checkpoint = write_tiny_checkpoint(tmp_path / "tiny.ckpt", *runner, "task.env_runner.max_steps=4")
    output_dir = tmp_path / "results"
    flags = [f"--checkpoint={checkpoint}", f"--output_dir={output_dir}", "--n_test=2", "--latency_calls=1"]
    assert main([*flags, "--cache_mode=threshold", "--num_caches=3"]) == 0
    runs = [output_dir / row.directory for row in ResultsStore(output_dir).rows()]
    both = output_dir / "media" / "side_by_side.mp4"
    assert set(output_dir.rglob("*.mp4")) == {both, *(directory / "media" / "100000.mp4" for directory in runs)}
    assert len(list(read_video(both))) == 4
    assert frame_rate(both) == stand_in_runner.FPS
    for directory in runs:
        video = directory / "media" / "100000.mp4"
        assert read(directory / "fast_eval_log.json")["test/sim_video_100000"] == str(video)
    html = write_report(output_dir).read_text()
    assert html.count('src="data:video/mp4;base64,') == 2
    assert "plain: score 0.50" in html


@pytest.mark.parametrize("spec", ["threshold:1", f"ddim:{K}+uniform:{K}"])
def test_scores_do_not_depend_on_what_ran_before(pusht_policy: Any, spec: str) -> None:
    """All methods see the same noise: a cache that computes everything changes no score."""
    method, task = parse_method(spec), PushTTask(max_steps=MAX_STEPS)
    plain_method = Method(sampler=method.sampler)
    observations = calibration_observations(pusht_policy, task)
    plan = make_plan(pusht_policy, method, found_at(()))
    torch.manual_seed(12)
    seeds = [100_000, 100_001]
    plain = evaluate(pusht_policy, task, seeds, observations, plain_method, latency_calls=1)
    cached = evaluate(pusht_policy, task, seeds, observations, method, plan, engine="eager", latency_calls=1)
    assert cached.rollout.scores == pytest.approx(plain.rollout.scores, abs=1e-12)
    assert cached.action_error(plain).mean == 0
    assert cached.cost.flops == plain.cost.flops
    assert FastDiffusionPolicy.summary(pusht_policy).mode == "original"


def test_a_failing_rollout_leaves_the_policy_plain(pusht_policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("simulator crashed")

    task, method = PushTTask(max_steps=8), parse_method("ddim:4+threshold:2")
    observations = calibration_observations(pusht_policy, task)
    plan = make_plan(pusht_policy, method, found_at(()))
    sampler = pusht_policy.noise_scheduler
    monkeypatch.setattr(PushTTask, "rollout", fail)
    with pytest.raises(RuntimeError, match="crashed"):
        evaluate(pusht_policy, task, [1], observations, method, plan, latency_calls=1)
    assert FastDiffusionPolicy.summary(pusht_policy).mode == "original"
    assert pusht_policy.noise_scheduler is sampler
    assert pusht_policy.num_inference_steps == K


def test_episodes_come_before_the_timing(pusht_policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls take seconds on some tasks: an environment that does not run shows before."""
    done: list[str] = []

    def note(name: str, function: Any) -> Any:
        return lambda *args, **options: done.append(name) or function(*args, **options)

    for name in ("measure_latency", "normalised_actions"):
        monkeypatch.setattr(comparison, name, note(name, getattr(comparison, name)))
    monkeypatch.setattr(PushTTask, "rollout", note("rollout", PushTTask.rollout))
    task, method = PushTTask(max_steps=8), parse_method("threshold:2")
    observations = calibration_observations(pusht_policy, task)
    plan = make_plan(pusht_policy, method, found_at(()))
    evaluate(pusht_policy, task, [1], observations, method, plan, latency_calls=1)
    assert done == ["rollout", "measure_latency", "measure_latency", "normalised_actions"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--n_test=0"], "--n_test 0"),
        (["--latency_calls=0"], "at least one"),
        (["--device=warp:9"], "warp:9"),
        (["--checkpoint=missing.ckpt"], "missing.ckpt"),
        (["--cache_mode=optimal", "--optimal_steps_dir=nowhere"], "nowhere"),
        (["--cache_mode=threshold", "--cache_threshold=0"], "0"),
        (["--seed=-3"], "negative"),
        (["--n_envs=0"], "--n_envs 0"),
        (["--disturb"], "task pusht cannot be disturbed"),
        (["--cache_mode=edit"], "needs edit_steps"),
        (["--cache_mode=optimal"], "needs optimal_steps_dir"),
        (["--optimal_steps_dir=nowhere", "--num_caches=11"], "num_caches must be an integer in 1..10"),
        (["--baselines=ddim:11"], "trained with 10 timesteps, which ddim:11 exceeds"),
        (["--baselines=ddim:4+bac:5:1"], "num_caches must be an integer in 1..4"),
        (["--output_dir=/proc/nowhere"], "/proc/nowhere"),
    ],
)
def test_mistakes_are_one_line_on_stderr(
    arguments: list[str], output_dir: Path, wrong: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--skip_video", *wrong]) == 2
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert last_line.startswith("error: ")
    assert message in last_line
    assert not (output_dir / "eval_results.json").exists()


def test_script_runs() -> None:
    script = REPOSITORY / "scripts" / "eval_fast_diffusion_policy.py"
    result = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True)
    assert "--optimal_steps_dir" in result.stdout


# -- video and table ---------------------------------------------------------------------------------------------


def write_grey(path: Path, levels: list[int], size: int = 64, fps: int = 10) -> Path:
    with open_video(path, fps) as video:
        for level in levels:
            video.append(np.full((size, size, 3), level, dtype=np.uint8))
    return path


def test_side_by_side_holds_the_last_frame_of_the_shorter(tmp_path: Path) -> None:
    left = write_grey(tmp_path / "left.mp4", [40, 80])
    right = write_grey(tmp_path / "right.mp4", [200, 160, 120, 100])
    frames = list(read_video(side_by_side(tmp_path / "both.mp4", {"plain": left, "cached": right})))
    assert len(frames) == 4
    pictures = [frame[-64:] for frame in frames]
    np.testing.assert_allclose([picture[:, :60].mean() for picture in pictures], [40, 80, 80, 80], atol=5)
    np.testing.assert_allclose([picture[:, 68:].mean() for picture in pictures], [200, 160, 120, 100], atol=5)
    assert frames[0][:-64].min() < 100  # the caption's letters


def test_side_by_side_plays_at_the_speed_of_the_films(tmp_path: Path) -> None:
    film = write_grey(tmp_path / "film.mp4", [40, 80, 120], fps=80)
    assert frame_rate(side_by_side(tmp_path / "both.mp4", {"plain": film, "cached": film})) == 80


def test_side_by_side_of_different_sizes(tmp_path: Path) -> None:
    left, right = write_grey(tmp_path / "left.mp4", [1]), write_grey(tmp_path / "right.mp4", [1], size=32)
    with pytest.raises(ValueError, match="differ in size"):
        side_by_side(tmp_path / "both.mp4", {"a": left, "b": right})
    with pytest.raises(FileNotFoundError):
        side_by_side(tmp_path / "both.mp4", {"a": left, "b": tmp_path / "none.mp4"})


def test_side_by_side_of_an_episode_that_was_not_filmed(
    arguments: list[str], output_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*arguments, "--cache_mode=threshold"]
    assert main([*command, "--skip_video"]) == 0
    assert main(command) == 2
    output = capsys.readouterr()
    assert "plain was evaluated without a film" in output.err
    assert "every 5" in output.out
