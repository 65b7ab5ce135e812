"""Modes, assets and mistakes, as a user of `apply_cache` meets them."""

from __future__ import annotations

import inspect
import os
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bacinfer import CacheSchedule, FastDiffusionPolicy, PolicyHandle, assets, bacinfer_files, bubbling_union
from bacinfer.core.blocks import find_blocks
from bacinfer.core.bubbling import block_error, select_blocks
from bacinfer.core.diffusion_cache_wrapper import FastDiffusionPolicy as FromModule
from helpers import TinyPolicy, act, decoder_model
from tiny_image_policies import image_policy

apply_cache, summary = FastDiffusionPolicy.apply_cache, FastDiffusionPolicy.summary
KEYS = [block.key for block in find_blocks(decoder_model(3))]
ACS = {key: (0, 1 + i % 8) for i, key in enumerate(KEYS)}


@pytest.fixture
def run(tmp_path: Path) -> assets.RunAssets:
    """An assets directory as BACInfer leaves it: M = 2, cosine, two selected blocks."""
    run = assets.RunAssets(tmp_path / "task" / "original")
    for block, steps in ACS.items():
        bacinfer_files.write_steps(run.steps_dir("cosine"), block, "cosine", steps, 10)
    bacinfer_files.write_pickle(bacinfer_files.selection_file(run.directory, 2), {KEYS[3]: 2.0, KEYS[1]: 1.0})
    return run


@pytest.fixture
def ours(tmp_path: Path) -> assets.RunAssets:
    """The same as our analysis leaves it."""
    run = assets.RunAssets(tmp_path / "ours" / "original")
    assets.write_schedules(run.steps_dir("cosine"), [assets.StoredSchedule("cosine", 2, 10, ACS)])
    assets.write_block_errors(run, dict.fromkeys(KEYS, 0.5) | {KEYS[3]: 2.0, KEYS[1]: 1.0})
    return run


def optimal(policy: TinyPolicy, run: assets.RunAssets, **kwargs):  # type: ignore[no-untyped-def]
    arguments = {"optimal_steps_dir": run.steps_dir("cosine"), "num_caches": 2, **kwargs}
    return apply_cache(policy, **arguments)


def test_exported_from_both_places() -> None:
    assert FromModule is FastDiffusionPolicy


def test_importing_the_package_needs_torch_and_numpy_only() -> None:
    heavy = "hydra", "omegaconf", "diffusers", "matplotlib", "gymnasium", "scipy"
    code = f"import sys, bacinfer; print([m for m in {heavy!r} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


# -- modes -----------------------------------------------------------------------------------------------------------


def test_threshold_is_the_default(policy: TinyPolicy) -> None:
    assert summary(apply_cache(policy)).schedule == CacheSchedule.periodic(KEYS, 10, 5)
    assert summary(policy).mode == "threshold"


@pytest.mark.parametrize(("num_caches", "interval"), [(10, 1), (4, 3), (3, 4), (1, 10)])
def test_a_number_of_caches_alone_sets_the_interval(policy: TinyPolicy, num_caches: int, interval: int) -> None:
    schedule = summary(apply_cache(policy, num_caches=num_caches)).schedule
    assert schedule == CacheSchedule.periodic(KEYS, 10, interval)


def test_a_number_that_equals_the_default_is_honoured_where_it_is_given() -> None:
    policy = TinyPolicy(num_inference_steps=100)
    assert summary(apply_cache(policy, num_caches=30)).schedule == CacheSchedule.periodic(KEYS, 100, 4)


def test_edit_updates_all_blocks_at_the_given_steps(policy: TinyPolicy) -> None:
    schedule = summary(apply_cache(policy, cache_mode="edit", edit_steps=[0, 2, 7])).schedule
    assert schedule.update_steps == dict.fromkeys(KEYS, (0, 2, 7))


def test_optimal_reads_each_block_and_refreshes_the_last_step(policy: TinyPolicy, run: assets.RunAssets) -> None:
    schedule = summary(optimal(policy, run)).schedule
    assert schedule.update_steps == {key: (*steps, 9) for key, steps in ACS.items()}
    schedule = summary(optimal(policy, run, refresh_last_step=False)).schedule
    assert schedule.update_steps == ACS
    assert summary(policy).mode == "optimal"


@pytest.mark.parametrize("num_bu_blocks", [0, 1, 2, 3])
def test_our_file_gives_what_bacinfers_give(
    policy: TinyPolicy, run: assets.RunAssets, ours: assets.RunAssets, num_bu_blocks: int
) -> None:
    if num_bu_blocks in (1, 3):  # of which BACInfer's directory has no selection
        path = bacinfer_files.block_errors_file(run.directory)
        bacinfer_files.write_pickle(path, assets.read_block_errors(ours))
    schedules = [summary(optimal(policy, d, num_bu_blocks=num_bu_blocks)).schedule for d in (run, ours)]
    assert schedules[0] == schedules[1]


def test_optimal_with_bubbling_union(policy: TinyPolicy, run: assets.RunAssets) -> None:
    own = CacheSchedule(10, ACS)
    expected = bubbling_union(own, [KEYS[3], KEYS[1]]).with_last_step()
    assert summary(optimal(policy, run, num_bu_blocks=2)).schedule.update_steps == expected.update_steps


@pytest.mark.parametrize("file_format", ["npz", "pickled lists", "pickled tensors"])
def test_bubbling_union_selects_from_residuals_where_no_selection_is_stored(
    policy: TinyPolicy, run: assets.RunAssets, file_format: str
) -> None:
    rng = np.random.default_rng(0)
    residuals = {key: rng.normal(size=(10, 1, 4)).astype("f4") * (i % 5) for i, key in enumerate(KEYS)}
    if file_format == "npz":
        assets.write_by_block(run.activations, residuals, KEYS)
    else:
        convert = torch.from_numpy if file_format == "pickled tensors" else np.asarray
        recorded = {bacinfer_files.module_name(key): array for key, array in residuals.items()}
        # BACInfer records other modules too, also such as are blocks in another policy.
        recorded |= dict.fromkeys(["decoder.norm", "encoder.layers.0.dropout1"], 99 * np.ones((10, 1, 4), "f4"))
        plain = {m: [convert(step) for step in r] for m, r in recorded.items()}
        run.activations.with_suffix(".pkl").write_bytes(pickle.dumps(plain))
    errors = {key: block_error(torch.from_numpy(array)) for key, array in residuals.items()}
    own = CacheSchedule(10, ACS)
    expected = bubbling_union(own, list(select_blocks(errors, 3))).with_last_step()
    assert summary(optimal(policy, run, num_bu_blocks=3)).schedule.update_steps == expected.update_steps


def test_bubbling_union_selects_from_stored_errors(policy: TinyPolicy, run: assets.RunAssets) -> None:
    errors = {key: float(i % 4) for i, key in enumerate(KEYS)}
    assets.write_block_errors(run, errors)
    own = CacheSchedule(10, ACS)
    expected = bubbling_union(own, list(select_blocks(errors, 4))).with_last_step()
    assert summary(optimal(policy, run, num_bu_blocks=4)).schedule.update_steps == expected.update_steps
    with pytest.raises(ValueError, match=r"num_bu_blocks must be in 1\.\.9"):
        optimal(policy, run, num_bu_blocks=10)


def test_schedule_is_run_as_it_is(policy: TinyPolicy) -> None:
    schedule = CacheSchedule(10, {KEYS[0]: (0, 4)} | {k: tuple(range(10)) for k in KEYS[1:]})
    figures = summary(apply_cache(policy, schedule=schedule))
    assert figures.schedule is schedule
    assert figures.mode == "schedule"


# -- summary ---------------------------------------------------------------------------------------------------------


def test_summary_of_a_plain_policy(policy: TinyPolicy) -> None:
    figures = summary(policy)
    assert (figures.mode, figures.engine, figures.num_inference_steps) == ("original", None, 10)
    assert figures.flops_fraction == 1
    assert {(c.updates, c.reuses) for c in figures.blocks.values()} == {(10, 0)}


def test_summary_counts(policy: TinyPolicy) -> None:
    figures = summary(apply_cache(policy, cache_threshold=4))
    assert {(c.updates, c.reuses) for c in figures.blocks.values()} == {(3, 7)}
    assert figures.mean_updates == 3
    # Of 16·W² weights a layer all are in blocks; the only other matrix is the time embedding, 1000·W.
    W, layers = 16, 3
    in_blocks, rest = layers * 16 * W**2, 1000 * W
    assert figures.flops_fraction == pytest.approx((0.3 * in_blocks + rest) / (in_blocks + rest))
    assert "3.0 updates a block" in str(figures)
    assert "█···█···█·" in str(figures)


def test_weights_beside_the_model_are_named_and_in_no_share(policy: TinyPolicy) -> None:
    figures = summary(apply_cache(policy, cache_threshold=4))
    assert figures.other_weights == {}
    assert "beside" not in str(figures)
    seeing = image_policy()
    encoder = sum(p.numel() for p in seeing.obs_encoder.parameters() if p.ndim >= 2)
    model = sum(p.numel() for p in seeing.model.parameters() if p.ndim == 2)
    figures = summary(apply_cache(seeing, cache_threshold=1))
    assert (figures.model_weights, figures.other_weights) == (model, {"obs_encoder": encoder})
    assert figures.flops_fraction == 1
    line = f"the model has {model:,}, for each step; beside it, in no share of FLOPs: obs_encoder {encoder:,} "
    assert line in str(figures)
    seeing.proj = torch.nn.Embedding(3, 5)  # what policies of other kinds have
    handle = PolicyHandle(seeing.model, 10, (seeing, "predict_action"))
    assert summary(handle).other_weights == {"obs_encoder": encoder, "proj": 15}


def test_missing_blocks_are_warned_of_once_and_computed_everywhere(policy: TinyPolicy, run: assets.RunAssets) -> None:
    for path in list(bacinfer_files.steps_files(run.steps_dir("cosine"), 2, "cosine").values())[:2]:
        path.unlink()
    with pytest.warns(UserWarning, match="computed at every step") as caught:
        optimal(policy, run)
    assert len(caught) == 1
    assert all(key in str(caught[0].message) for key in KEYS[:2])
    assert summary(policy).blocks[KEYS[0]].updates == 10
    assert summary(policy).warnings == (str(caught[0].message),)


def test_nothing_is_warned_of_without_a_reason(policy: TinyPolicy, run: assets.RunAssets) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimal(policy, run, num_bu_blocks=2)


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cache_mode": "fast"}, ValueError, "unknown cache_mode 'fast'; there are original, threshold"),
        ({"engine": "warp"}, ValueError, "unknown engine 'warp'; there are"),
        ({"cache_mode": "optimal"}, ValueError, "needs optimal_steps_dir"),
        ({"cache_mode": "edit"}, ValueError, "needs edit_steps"),
        ({"cache_mode": ""}, ValueError, "unknown cache_mode ''"),
        ({"cache_mode": "edit", "edit_steps": []}, ValueError, "first update step must be 0"),
        ({"cache_mode": "edit", "edit_steps": [0, 10]}, ValueError, "does not exist with K = 10"),
        ({"edit_steps": [0]}, ValueError, r"edit_steps=\[0\] has no effect with cache_mode='threshold'"),
        ({"cache_threshold": 0}, ValueError, "cache_threshold"),
        ({"num_caches": 0}, ValueError, r"num_caches must be an integer in 1\.\.10"),
        ({"num_caches": 11}, ValueError, r"num_caches must be an integer in 1\.\.10"),
        ({"schedule": CacheSchedule(10, {}), "cache_mode": "edit"}, ValueError, "not both"),
        ({"schedule": CacheSchedule(11, {})}, ValueError, "made for K = 11 .* num_inference_steps = 10"),
        ({"schedule": CacheSchedule(10, {"a.0_ff_block": (0,)})}, ValueError, "blocks that the policy lacks"),
        (
            {"optimal_steps_dir": "nowhere", "num_caches": 5},
            FileNotFoundError,
            "no such directory.*get_optimal_cache_update_steps",
        ),
        ({"optimal_steps_dir": "nowhere", "num_caches": 0}, ValueError, r"in 1\.\.10"),
        ({"optimal_steps_dir": "nowhere", "num_caches": 11}, ValueError, r"in 1\.\.10"),
        ({"optimal_steps_dir": "nowhere", "num_caches": 2, "num_bu_blocks": -1}, ValueError, "num_bu_blocks"),
    ],
)
def test_wrong_arguments(policy: TinyPolicy, arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        apply_cache(policy, **arguments)
    assert summary(policy).mode == "original"


@pytest.mark.parametrize(
    ("mode", "argument", "choice"),
    [
        ({"cache_mode": "original"}, {"cache_threshold": 7}, "'threshold'"),
        ({"cache_mode": "original"}, {"num_caches": 3}, "'threshold' or 'optimal'"),
        ({"cache_mode": "original"}, {"optimal_steps_dir": "steps"}, "'optimal'"),
        ({"cache_mode": "threshold"}, {"optimal_steps_dir": "steps"}, "'optimal'"),
        ({}, {"metric": "l1"}, "'optimal'"),
        ({}, {"num_bu_blocks": 1}, "'optimal'"),
        ({}, {"refresh_last_step": False}, "'optimal'"),
        ({"cache_threshold": 5}, {"num_caches": 3}, "'optimal'"),
        ({"optimal_steps_dir": "steps"}, {"cache_threshold": 7}, "'threshold'"),
        ({"optimal_steps_dir": "steps"}, {"edit_steps": [0]}, "'edit'"),
        ({"cache_mode": "edit", "edit_steps": [0]}, {"num_caches": 3}, "'threshold' or 'optimal'"),
        ({"schedule": CacheSchedule(10, {})}, {"num_bu_blocks": 1}, "'optimal'"),
        ({"schedule": CacheSchedule(10, {})}, {"cache_threshold": 4}, "'threshold'"),
    ],
)
def test_an_argument_without_effect_is_refused(
    policy: TinyPolicy, mode: dict[str, Any], argument: dict[str, Any], choice: str
) -> None:
    ((name, value),) = argument.items()
    message = re.escape(f"{name}={value} has no effect with") + f".*leave it out, or choose cache_mode {choice}"
    with pytest.raises(ValueError, match=message):
        apply_cache(policy, **mode, **argument)
    assert summary(policy).mode == "original"


def test_defaults_may_be_written_out(policy: TinyPolicy, run: assets.RunAssets) -> None:
    """As code does that passes the whole list in every mode."""
    for interval in (5, 4):
        apply_cache(policy, interval, None, 30, "cosine", "threshold", 0)
        assert summary(policy).schedule == CacheSchedule.periodic(KEYS, 10, interval)
    apply_cache(policy, 5, run.steps_dir("cosine"), 2, "cosine", None, 0)
    assert summary(policy).mode == "optimal"
    apply_cache(policy, 5, None, 30, "cosine", "original", 0)
    assert summary(policy).mode == "original"
    parameters = inspect.signature(apply_cache).parameters
    assert list(parameters)[:7] == [
        *("policy", "cache_threshold", "optimal_steps_dir", "num_caches", "metric", "cache_mode", "num_bu_blocks"),
    ]
    assert [str(parameters[name].default) for name in list(parameters)[1:7]] == [
        "5",
        "None",
        "30",
        "cosine",
        "None",
        "0",
    ]


@pytest.mark.parametrize("name", ["model", "num_inference_steps", "predict_action"])
def test_what_is_no_policy(name: str) -> None:
    class Partial:
        model, num_inference_steps, predict_action = decoder_model(), 10, None

    delattr(Partial, name)
    for call in (apply_cache, summary):
        with pytest.raises(TypeError, match=f"it has no {name}"):
            call(Partial())


def test_model_that_is_no_module(policy: TinyPolicy) -> None:
    class Function:
        model, num_inference_steps, predict_action = print, 10, None

    with pytest.raises(TypeError, match=r"policy.model must be a torch.nn.Module"):
        apply_cache(Function())


@pytest.mark.parametrize(("metric", "num_caches"), [("cosine", 3), ("l7", 2)])
def test_missing_steps_list_what_is_there(
    policy: TinyPolicy, run: assets.RunAssets, metric: str, num_caches: int
) -> None:
    with pytest.raises(FileNotFoundError, match=f"'{metric}' with {num_caches} caches.*cosine 2"):
        optimal(policy, run, metric=metric, num_caches=num_caches)


def test_directory_of_something_else(policy: TinyPolicy, run: assets.RunAssets) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds \['bu_block_selection', 'optimal_steps'\]"):
        optimal(policy, run, optimal_steps_dir=run.directory)


class Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("touch executed",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps([0, 10]), "update step 10 does not exist with K = 10"),
        (pickle.dumps([0, 5, 3]), "ascend"),
        (pickle.dumps([0, 3, 3]), "ascend"),
        (pickle.dumps([0, 2.5]), "update steps must be integers, found list"),
        (pickle.dumps(["0"]), "update steps must be integers, found list"),
        (pickle.dumps([]), "must be 0"),
        (pickle.dumps({"steps": [0]}), "expected a list of update steps, found dict"),
        (pickle.dumps([0, Evil()]), "system"),
        (pickle.dumps([0, 1])[:-3], "damaged"),
        (b"", "damaged"),
        (b"not a pickle", "damaged|UnsafePickle|not"),
    ],
)
def test_bad_steps_file(
    policy: TinyPolicy, run: assets.RunAssets, content: bytes, message: str, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    path = bacinfer_files.steps_files(run.steps_dir("cosine"), 2, "cosine")[KEYS[4]]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        optimal(policy, run)
    assert str(path) in str(error.value) or f"{run.steps_dir('cosine')}: {KEYS[4]}" in str(error.value)
    assert not (tmp_path / "executed").exists()
    assert summary(policy).mode == "original"


def test_steps_of_another_number_of_denoising_steps(policy: TinyPolicy, run: assets.RunAssets) -> None:
    with pytest.raises(ValueError, match=r"made for K = 10 denoising steps, the policy has 20"):
        optimal(TinyPolicy(num_inference_steps=20), run)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({KEYS[0]: 1.0}, "expected 2 blocks, found 1"),
        ({KEYS[0]: 1.0, "decoder.layers.9_ff_block": 2.0}, "does not have"),
        ([KEYS[0], KEYS[1]], "expected a dict"),
        ({KEYS[0]: "large", KEYS[1]: 1.0}, "expected a dict"),
        (Evil(), "system"),
    ],
)
def test_bad_block_selection(policy: TinyPolicy, run: assets.RunAssets, selection: object, message: str) -> None:
    bacinfer_files.selection_file(run.directory, 2).write_bytes(pickle.dumps(selection))
    with pytest.raises(ValueError, match=message):
        optimal(policy, run, num_bu_blocks=2)


def test_bubbling_union_without_selection_or_residuals(policy: TinyPolicy, run: assets.RunAssets) -> None:
    with pytest.raises(FileNotFoundError, match=r"block_errors.json, or residuals"):
        optimal(policy, run, num_bu_blocks=5)


def test_cached_policy_acts_like_its_schedule_says(policy: TinyPolicy, run: assets.RunAssets) -> None:
    by_mode = act(optimal(policy, run, num_bu_blocks=2))
    schedule = summary(policy).schedule
    assert torch.equal(act(apply_cache(policy, schedule=schedule)), by_mode)
