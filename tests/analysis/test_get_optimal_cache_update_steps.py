"""The whole pipeline: from a policy to files that `apply_cache` runs, resumed where it was interrupted."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analysis_helpers import NUM_STEPS, FakeTask

from bacinfer import ResidualBlock, assets, bacinfer_files, files, register_layer, unregister_layer
from bacinfer.analysis import get_optimal_cache_update_steps as pipeline
from bacinfer.analysis.get_optimal_cache_update_steps import main
from bacinfer.analysis.pipeline import Sampling, analyse_policy, collect_statistics
from bacinfer.analysis.recorded import read_matrices
from bacinfer.analysis.residuals import record, recordings
from bacinfer.analysis.similarity import METRICS, similarity
from bacinfer.analysis.update_steps import optimal_update_steps
from bacinfer.commands import info
from bacinfer.core.blocks import find_blocks
from bacinfer.core.bubbling import block_error, select_blocks
from bacinfer.core.diffusion_cache_wrapper import FastDiffusionPolicy
from helpers import WIDTH, TinyPolicy, act

SAMPLING = Sampling("0" * 64, num_inference_steps=10, observations_per_demo=1, noise_seed=11)


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    return files.read_arrays(path)


def assert_same_arrays(a: Path, b: Path) -> None:
    left, right = read(a)[0], read(b)[0]
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])


def test_the_cache_runs_what_the_pipeline_wrote(policy: TinyPolicy, task: FakeTask, run: assets.RunAssets) -> None:
    schedules = analyse_policy(policy, task, run, [11], list(METRICS), [3, 10], SAMPLING)
    plain = act(policy)
    for metric in METRICS:
        FastDiffusionPolicy.apply_cache(
            policy, optimal_steps_dir=run.steps_dir(metric), num_caches=3, metric=metric, refresh_last_step=False
        )
        applied = FastDiffusionPolicy.summary(policy).schedule
        assert applied is not None
        assert applied.update_steps == schedules[metric][3].update_steps
        assert not torch.equal(act(policy), plain)
        FastDiffusionPolicy.apply_cache(
            policy, optimal_steps_dir=run.steps_dir(metric), num_caches=10, metric=metric, num_bu_blocks=2
        )
        assert torch.equal(act(policy), plain)  # K updates of every block are no caching
        FastDiffusionPolicy.remove_cache(policy)


def test_files_hold_what_the_stages_find(policy: TinyPolicy, task: FakeTask, run: assets.RunAssets) -> None:
    analyse_policy(policy, task, run, [11], ["cosine", "l1"], [4], SAMPLING)
    (recording,) = recordings(policy, task, 11, 1, SAMPLING.noise_seed)
    errors = {}
    for block in find_blocks(policy.model):
        residuals = recording.residuals[block.key]
        errors[block.key] = block_error(residuals)
        for metric, matrix in similarity(residuals, ["cosine", "l1"]).items():
            stored = read(run.similarity_matrices)[0][f"{block.key}/{metric}"]
            np.testing.assert_array_equal(stored, matrix.astype(np.float32))
            expected = list(optimal_update_steps(stored, [4], maximise=METRICS[metric].maximise)[4])
            schedules = json.loads((run.steps_dir(metric) / "schedules.json").read_text())["schedules"]
            assert [(s["metric"], s["num_caches"], s["num_inference_steps"]) for s in schedules] == [(metric, 4, 10)]
            assert schedules[0]["update_steps"][block.key] == expected
    assert assets.read_block_errors(run) == pytest.approx(errors, rel=1e-6)
    written = {
        path.name for path in run.directory.rglob("*") if path.is_file() and path.suffix not in (".png", ".lock")
    }
    assert written == {"activations.npz", "similarity_matrices.npz", "block_errors.json", "schedules.json"}


def test_bacinfers_files_are_written_on_request(policy: TinyPolicy, task: FakeTask, run: assets.RunAssets) -> None:
    schedules = analyse_policy(policy, task, run, [11], ["cosine"], [4, 2], SAMPLING, bacinfer_files_too=True)
    for num_caches in (2, 4):
        found = bacinfer_files.steps_files(run.steps_dir("cosine"), num_caches, "cosine")
        steps = {block: tuple(pickle.loads(path.read_bytes())) for block, path in found.items()}
        assert steps == schedules["cosine"][num_caches].update_steps
        for path in found.values():
            description = json.loads(path.with_suffix(".json").read_text())
            assert (description["metric"], description["num_steps"]) == ("cosine", num_caches)
    errors = assets.read_block_errors(run)
    assert pickle.loads(bacinfer_files.block_errors_file(run.directory).read_bytes()) == errors
    for num_blocks in range(1, 6):
        selected = pickle.loads(bacinfer_files.selection_file(run.directory, num_blocks).read_bytes())
        assert list(selected.items()) == list(select_blocks(errors, num_blocks).items())


class Gated(torch.nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = torch.nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(x)


@pytest.fixture
def own_policy(policy: TinyPolicy) -> Iterator[TinyPolicy]:
    """A policy whose blocks are those of a layer class that is not PyTorch's, in a place of their own."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = torch.nn.ModuleList(Gated(WIDTH) for _ in range(2))
            self.last = Gated(WIDTH)

        def forward(self, sample: torch.Tensor, timestep: Any, cond: Any = None) -> torch.Tensor:
            for stage in self.stages:
                sample = stage(sample)
            return self.last(sample)

    torch.manual_seed(0)
    policy.model = Model()
    register_layer(
        Gated, [ResidualBlock("gate_block", "mlp", lambda layer, x: layer.mlp(x), lambda layer, x, r: x + r, ("mlp",))]
    )
    yield policy
    unregister_layer(Gated)


def test_blocks_of_an_own_layer_class_are_stored_read_and_shown(
    own_policy: TinyPolicy, task: FakeTask, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = assets.RunAssets(tmp_path / "own" / "original")
    blocks = ["stages.0_gate_block", "stages.1_gate_block", "last_gate_block"]
    with pytest.raises(ValueError, match=r"cannot name the block 'stages\.0_gate_block'"):
        analyse_policy(own_policy, task, run, [11], ["cosine"], [3], SAMPLING, bacinfer_files_too=True)
    assert task.demos == []  # refused before the policy ran
    found = analyse_policy(own_policy, task, run, [11], ["cosine"], [3], SAMPLING)["cosine"][3].update_steps
    assert list(found) == blocks
    steps_dir = run.steps_dir("cosine")
    FastDiffusionPolicy.apply_cache(own_policy, optimal_steps_dir=steps_dir, num_caches=3)
    applied = FastDiffusionPolicy.summary(own_policy).schedule
    assert applied is not None
    assert applied.update_steps == {block: tuple(sorted({*found[block], 9})) for block in blocks}
    assert list(assets.read_activations(run)) == list(read_matrices(run, "cosine")) == blocks
    flags = ["--assets_dir", str(tmp_path), "--task", "own", "--num_caches", "3"]
    capsys.readouterr()
    assert info.main(["steps", *flags]) == 0
    shown = capsys.readouterr().out
    assert all(f"{block}\n  ACS      3: {' '.join(map(str, found[block]))}\n" in shown for block in blocks)
    assert info.main(["counts", *flags]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [(row[0], row[-1]) for row in rows] == [("gate_block", "2"), ("last_gate_block", "1"), ("all", "3")]


def test_an_analysis_of_an_earlier_version_is_gone_on_with(
    policy: TinyPolicy, task: FakeTask, run: assets.RunAssets, tmp_path: Path
) -> None:
    collect_statistics(policy, task, run, [11], ["cosine"], SAMPLING)
    arrays, metadata = read(run.similarity_matrices)
    modules = {bacinfer_files.module_name(block): block for block in metadata["blocks"]}
    keys = {block: module for module, block in modules.items()}
    old = {f"{keys[name.rpartition('/')[0]]}/{name.rpartition('/')[2]}": array for name, array in arrays.items()}
    files.write_arrays(run.similarity_matrices, old, {**metadata, "blocks": modules})
    collect_statistics(policy, task, run, [11, 12], ["cosine"], SAMPLING)
    assert task.demos == [11, 12]
    whole = assets.RunAssets(tmp_path / "whole")
    collect_statistics(policy, FakeTask(), whole, [11, 12], ["cosine"], SAMPLING)
    assert_same_arrays(run.similarity_matrices, whole.similarity_matrices)


def test_residuals_are_those_of_the_first_demo_in_half_precision(
    policy: TinyPolicy, task: FakeTask, run: assets.RunAssets
) -> None:
    analyse_policy(policy, task, run, [11, 12], ["cosine"], [4], SAMPLING)
    arrays, metadata = read(run.activations)
    (recording,) = recordings(policy, task, 11, 1, SAMPLING.noise_seed)
    assert list(arrays) == list(recording.residuals) == [b.key for b in find_blocks(policy.model)]
    for module, residuals in recording.residuals.items():
        assert arrays[module].dtype == np.float16
        np.testing.assert_array_equal(arrays[module], residuals.half().numpy())
    assert metadata["source"]["demo_idx"] == 11


def test_pictures_are_drawn_for_every_metric(policy: TinyPolicy, task: FakeTask, run: assets.RunAssets) -> None:
    analyse_policy(policy, task, run, [11], ["cosine", "mse"], [2, 4], SAMPLING)
    pictures = sorted((run.directory / "figures").iterdir())
    names = ["schedules_cosine", "schedules_mse", "similarity_cosine", "similarity_mse"]
    assert [picture.stem for picture in pictures] == names
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_matrices_are_means_over_all_observations(policy: TinyPolicy, task: FakeTask, run: assets.RunAssets) -> None:
    sampling = replace(SAMPLING, observations_per_demo=3)
    statistics = collect_statistics(policy, task, run, [11, 100_000], ["l1"], sampling)
    assert statistics.num_observations == 6
    found = [r for demo in (11, 100_000) for r in recordings(policy, task, demo, 3, 11)]
    for module, matrix in statistics.matrices("l1").items():
        expected = np.mean([similarity(r.residuals[module], ["l1"])["l1"] for r in found], axis=0)
        np.testing.assert_allclose(matrix, expected, rtol=1e-5, atol=1e-6)
    errors = statistics.block_errors()
    for block in found[0].residuals:
        assert errors[block] == pytest.approx(np.mean([block_error(r.residuals[block]) for r in found]), rel=1e-5)


def test_an_episode_that_ends_early_is_named(
    policy: TinyPolicy, run: assets.RunAssets, capsys: pytest.CaptureFixture[str]
) -> None:
    class ShortTask(FakeTask):
        def observations(self, policy: Any, demo_idx: int, count: int = 1) -> Iterator[dict[str, torch.Tensor]]:
            return super().observations(policy, demo_idx, min(count, 2))

    sampling = replace(SAMPLING, observations_per_demo=3)
    assert collect_statistics(policy, ShortTask(), run, [4], ["l1"], sampling).num_observations == 2
    assert "the episode of demo 4 ended after 2 of 3 observations" in capsys.readouterr().err


def test_observations_have_noise_of_their_own(policy: TinyPolicy, task: FakeTask) -> None:
    obs = next(task.observations(policy, 0))
    block = find_blocks(policy.model)[0].key
    first, again, other = (record(policy, obs, seed).residuals[block] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_random_state_and_the_policy_are_left_as_found(
    policy: TinyPolicy, task: FakeTask, run: assets.RunAssets
) -> None:
    plain = act(policy)
    state = torch.random.get_rng_state()
    attributes = set(vars(policy))
    analyse_policy(policy, task, run, [11], ["cosine"], [4], SAMPLING)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert set(vars(policy)) == attributes
    assert torch.equal(act(policy), plain)


# -- going on after an interruption ------------------------------------------------------------------------------


class Killed(BaseException):
    """As abrupt as a signal: no handler of ordinary errors sees it."""


class DyingTask(FakeTask):
    def __init__(self, at_demo: int) -> None:
        super().__init__()
        self.at_demo = at_demo

    def observations(self, policy: Any, demo_idx: int, count: int = 1) -> Iterator[dict[str, torch.Tensor]]:
        if demo_idx == self.at_demo:
            raise Killed
        return super().observations(policy, demo_idx, count)


def test_a_killed_run_goes_on_with_the_missing_demos_and_ends_with_the_same_numbers(
    policy: TinyPolicy, task: FakeTask, run: assets.RunAssets, tmp_path: Path
) -> None:
    demos = [11, 12, 13]
    with pytest.raises(Killed):
        analyse_policy(policy, DyingTask(at_demo=13), run, demos, ["cosine"], [4], SAMPLING)
    assert read(run.similarity_matrices)[1]["demos"] == [11, 12]

    analyse_policy(policy, task, run, demos, ["cosine"], [4], SAMPLING)
    assert task.demos == [13]

    whole = assets.RunAssets(tmp_path / "whole")
    analyse_policy(policy, FakeTask(), whole, demos, ["cosine"], [4], SAMPLING)
    assert_same_arrays(run.similarity_matrices, whole.similarity_matrices)
    assert_same_arrays(run.activations, whole.activations)


def test_what_is_there_is_used_for_new_budgets(
    policy: TinyPolicy, task: FakeTask, run: assets.RunAssets, capsys: pytest.CaptureFixture[str]
) -> None:
    analyse_policy(policy, task, run, [11], ["cosine", "l1"], [4], SAMPLING)
    analyse_policy(policy, task, run, [11], ["l1"], [2], SAMPLING)
    assert task.demos == [11]
    assert "using" in capsys.readouterr().err
    assert assets.available_schedules(run.steps_dir("l1")) == [("l1", 2), ("l1", 4)]


@pytest.mark.parametrize(
    ("demos", "metrics", "sampling", "reason"),
    [
        ([12], ["cosine"], SAMPLING, "also of demos [11]"),
        ([11], ["mse"], SAMPLING, "no mse"),
        ([11], ["cosine"], replace(SAMPLING, checkpoint_sha256="1" * 64), "checkpoint_sha256 changed"),
        ([11], ["cosine"], replace(SAMPLING, noise_seed=12), "noise_seed changed from 11 to 12"),
        ([11], ["cosine"], replace(SAMPLING, observations_per_demo=2), "observations_per_demo changed"),
    ],
)
def test_a_changed_request_recomputes_and_says_so(
    policy: TinyPolicy,
    task: FakeTask,
    run: assets.RunAssets,
    capsys: pytest.CaptureFixture[str],
    demos: list[int],
    metrics: list[str],
    sampling: Sampling,
    reason: str,
) -> None:
    collect_statistics(policy, task, run, [11], ["cosine"], SAMPLING)
    capsys.readouterr()
    statistics = collect_statistics(policy, task, run, demos, metrics, sampling)
    assert task.demos == [11, *demos]
    said = capsys.readouterr().err
    assert "recomputing" in said
    assert reason in said
    assert "cosine" in statistics.metrics  # what was asked for earlier stays


def test_another_k_recomputes(task: FakeTask, run: assets.RunAssets, capsys: pytest.CaptureFixture[str]) -> None:
    collect_statistics(TinyPolicy(), task, run, [11], ["cosine"], SAMPLING)
    sampling = replace(SAMPLING, num_inference_steps=6)
    statistics = collect_statistics(TinyPolicy(num_inference_steps=6), task, run, [11], ["cosine"], sampling)
    assert "num_inference_steps changed from 10 to 6" in capsys.readouterr().err
    assert all(matrix.shape == (6, 6) for matrix in statistics.matrices("cosine").values())


def test_force_recomputes_even_what_is_damaged(policy: TinyPolicy, task: FakeTask, run: assets.RunAssets) -> None:
    collect_statistics(policy, task, run, [11], ["cosine"], SAMPLING)
    run.similarity_matrices.write_bytes(b"PK damaged")
    with pytest.raises(ValueError, match=r"similarity_matrices\.npz is not a complete"):
        collect_statistics(policy, task, run, [11], ["cosine"], SAMPLING)
    collect_statistics(policy, task, run, [11], ["cosine"], SAMPLING, force=True)
    assert read(run.similarity_matrices)[1]["demos"] == [11]


def test_a_full_disk_leaves_the_old_files(
    policy: TinyPolicy, task: FakeTask, run: assets.RunAssets, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect_statistics(policy, task, run, [11], ["cosine"], SAMPLING)
    before = {path: path.read_bytes() for path in run.directory.iterdir()}

    def full(file: Any, **arrays: Any) -> None:
        file.write(b"half of a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        collect_statistics(policy, task, run, [11, 12], ["cosine"], SAMPLING)
    assert {path: path.read_bytes() for path in run.directory.iterdir()} == before


# -- what a user can get wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, 11])
def test_budgets_outside_1_to_k_are_refused_before_the_policy_runs(
    policy: TinyPolicy, task: FakeTask, run: assets.RunAssets, budget: int
) -> None:
    with pytest.raises(ValueError, match=r"integer in 1\.\.10"):
        analyse_policy(policy, task, run, [11], ["cosine"], [5, budget], SAMPLING)
    assert task.demos == []


def test_unknown_metrics_are_refused_before_the_policy_runs(
    policy: TinyPolicy, task: FakeTask, run: assets.RunAssets
) -> None:
    with pytest.raises(ValueError, match="unknown metric 'cosin'"):
        analyse_policy(policy, task, run, [11], ["cosin"], [5], SAMPLING)
    assert task.demos == []


def test_negative_demos_are_refused(policy: TinyPolicy, task: FakeTask, run: assets.RunAssets) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        analyse_policy(policy, task, run, [-1], ["cosine"], [5], SAMPLING)


def test_a_policy_that_yields_nan_is_refused(policy: TinyPolicy, task: FakeTask, run: assets.RunAssets) -> None:
    torch.nn.init.constant_(policy.model.decoder.layers[1].linear2.weight, float("nan"))
    with pytest.raises(ValueError, match=r"decoder\.layers\.1_ff_block.*step 0.*NaN"):
        analyse_policy(policy, task, run, [11], ["cosine"], [5], SAMPLING)
    assert not run.directory.exists()


@pytest.mark.parametrize(
    "arguments", [["--demo_idx", "first"], ["--demo_idx", "1,x"], ["--demo_idx", "1", "--num_demos", "2"]]
)
def test_demos_that_are_no_integers_or_contradict_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["-c", "x.ckpt", "-o", "out", *arguments])
    assert exit_.value.code == 2
    assert "--demo_idx" in capsys.readouterr().err


# -- the command -------------------------------------------------------------------------------------------------


def test_the_command_analyses_a_checkpoint(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["-c", str(checkpoint), "-o", str(tmp_path / "pusht"), "--num_caches", "3,5", "--metrics", "cosine,mse"]
    assert main([*command, "--num_demos", "2"]) == 0
    run = assets.RunAssets(tmp_path / "pusht" / "original")
    assert read(run.similarity_matrices)[1]["demos"] == [0, 1]
    for metric in ("cosine", "mse"):
        assert assets.available_schedules(run.steps_dir(metric)) == [(metric, 3), (metric, 5)]
    assert str(run.steps_dir("cosine")) in capsys.readouterr().out

    assert main([*command, "--num_demos", "2"]) == 0
    assert "using" in capsys.readouterr().err


def test_the_default_is_demo_11_with_three_metrics_and_four_budgets(checkpoint: Path) -> None:
    args = pipeline.build_parser().parse_args(["-c", str(checkpoint), "-o", "out"])
    assert (args.demo_idx, args.noise_seed, args.observations_per_demo) == ([11], 11, 1)
    assert (args.metrics, args.num_caches) == (["cosine", "l1", "mse"], [5, 8, 10, 20])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_caches", str(NUM_STEPS + 1)], "integer in 1..10"),
        (["--num_caches", "5", "--num_demos", "0"], "--num_demos must be at least 1"),
        (["--num_caches", "5", "--metrics", "euclid"], "unknown metric 'euclid'"),
        (["--num_caches", "5", "--observations_per_demo", "0"], "count"),
    ],
)
def test_mistakes_end_with_one_line_and_status_2(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["-c", str(checkpoint), "-o", str(tmp_path), *arguments]) == 2
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in last_line
    assert message in last_line
