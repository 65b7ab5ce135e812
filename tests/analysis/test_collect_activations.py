"""Recording residuals, and the command that stores them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from analysis_helpers import NUM_STEPS, FakeTask

from bacinfer import assets, files
from bacinfer.analysis.collect_activations import main
from bacinfer.analysis.residuals import Recording, call_seed, record, write_recording
from bacinfer.core.blocks import find_blocks
from bacinfer.core.calls import seeded_noise
from bacinfer.core.diffusion_cache_wrapper import FastDiffusionPolicy
from helpers import WIDTH, TinyPolicy


def test_a_recording_holds_every_block_and_the_plain_action(policy: TinyPolicy, task: FakeTask) -> None:
    obs = next(task.observations(policy, 0))
    recording = record(policy, obs, noise_seed=3)
    blocks = find_blocks(policy.model)
    assert list(recording.residuals) == [block.key for block in blocks]
    assert {tuple(r.shape) for r in recording.residuals.values()} == {(NUM_STEPS, 1, 4, WIDTH)}
    with torch.no_grad(), seeded_noise(policy, 3):
        assert torch.equal(recording.result["action_pred"], policy.predict_action(obs)["action_pred"])


def test_residuals_are_the_outputs_of_the_blocks_modules(policy: TinyPolicy, task: FakeTask) -> None:
    """What `dropout3` of a layer puts out is its feed-forward residual; hooks see it where no engine is involved."""
    obs = next(task.observations(policy, 0))
    seen: list[torch.Tensor] = []
    module = policy.model.get_submodule("decoder.layers.1.dropout3")
    hook = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output.clone()))
    with torch.enable_grad(), seeded_noise(policy, 3):  # with gradients torch.nn does not fuse the layer
        policy.predict_action(obs)
    hook.remove()
    recorded = record(policy, obs, noise_seed=3).residuals["decoder.layers.1_ff_block"]
    torch.testing.assert_close(recorded, torch.stack(seen).detach(), rtol=1e-5, atol=1e-6)


def test_a_cached_policy_shows_stored_residuals_where_it_reuses_them(policy: TinyPolicy, task: FakeTask) -> None:
    FastDiffusionPolicy.apply_cache(policy, cache_threshold=4)
    residuals = record(policy, next(task.observations(policy, 0)), noise_seed=3).residuals
    for block in residuals.values():
        held = [0, 0, 0, 0, 4, 4, 4, 4, 8, 8]
        assert torch.equal(block, block[held])
        assert not torch.equal(block[0], block[4])


def test_seeds_of_calls_differ_and_do_not_change_between_runs() -> None:
    seeds = {call_seed(seed, demo, index) for seed in (0, 11) for demo in (0, 11) for index in (0, 1)}
    assert len(seeds) == 8
    assert call_seed(11, 11) == call_seed(11, 11, 0) == 1299733305


@pytest.mark.parametrize(
    ("value", "dtype"), [(1.0, np.float16), (0.0, np.float16), (1e5, np.float32), (1e-6, np.float32)]
)
def test_half_precision_is_kept_for_what_it_can_hold(
    run: assets.RunAssets, value: float, dtype: type[np.floating]
) -> None:
    residuals = torch.full((3, 1, 2, 2), value)
    write_recording(run, Recording({"decoder.layers.0_sa_block": residuals}, {}), {})
    stored = assets.read_activations(run)["decoder.layers.0_sa_block"]
    assert stored.dtype == dtype
    np.testing.assert_allclose(stored, residuals, rtol=1e-3)


# -- the command -------------------------------------------------------------------------------------------------


def collect(checkpoint: Path, out: Path, *arguments: str) -> int:
    return main(["-c", str(checkpoint), "-o", str(out), "-t", "pusht", *arguments])


@pytest.mark.parametrize(
    ("arguments", "directory"),
    [
        ([], "original"),
        (["--cache_mode", "threshold", "--cache_threshold", "3"], "threshold_3"),
        (["--cache_mode", "threshold", "--num_caches", "3"], "threshold_4"),  # ceil(10 / 3)
        (["--cache_mode", "edit", "--edit_steps", "0,4,8"], "edit_steps_0_4_8"),
    ],
)
def test_each_mode_has_a_directory(checkpoint: Path, tmp_path: Path, arguments: list[str], directory: str) -> None:
    assert collect(checkpoint, tmp_path, *arguments) == 0
    run = assets.RunAssets(tmp_path / "pusht" / directory)
    assert len(assets.read_activations(run)) == 6
    assert [path.name for path in run.directory.parent.iterdir()] == [directory]


def test_mode_optimal_has_a_directory_too(checkpoint: Path, tmp_path: Path) -> None:
    run = assets.RunAssets(tmp_path / "pusht" / "original")
    steps = {
        f"decoder.layers.{n}_{kind}": [0, 2 + n] for n in range(2) for kind in ("sa_block", "mha_block", "ff_block")
    }
    assets.write_schedules(run.steps_dir("l1"), [assets.StoredSchedule("l1", 2, NUM_STEPS, steps)])
    assets.write_block_errors(run, {block: float(-n) for n, block in enumerate(steps)})
    flags = ["--optimal_steps_dir", str(run.steps_dir("l1")), "--metric", "l1", "--num_caches", "2", "--bu"]
    assert collect(checkpoint, tmp_path, "--cache_mode", "optimal", *flags) == 0
    recorded = assets.RunAssets(tmp_path / "pusht" / "optimal_l1_caches_2").activations
    steps = files.read_arrays(recorded)[1]["source"]["update_steps"]
    assert steps["decoder.layers.0_sa_block"] == [0, 2, 3, 9]  # its own, those of layer 1's ff_block, the last
    assert steps["decoder.layers.1_ff_block"] == [0, 3, 9]


def test_a_recording_is_kept_and_never_silently_replaced(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = assets.RunAssets(tmp_path / "pusht" / "original").activations
    assert collect(checkpoint, tmp_path) == 0
    first = path.read_bytes()

    assert collect(checkpoint, tmp_path) == 0
    assert "there already" in capsys.readouterr().out

    assert collect(checkpoint, tmp_path, "--demo_idx", "12") == 2
    assert "--force" in capsys.readouterr().err
    assert path.read_bytes() == first

    assert collect(checkpoint, tmp_path, "--demo_idx", "12", "--force") == 0
    assert path.read_bytes() != first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--demo_idx", "-3"], "must not be negative"),
        (["--cache_mode", "edit"], "edit_steps"),
        (["--cache_mode", "optimal"], "optimal_steps_dir"),
        (["--device", "warp"], "device 'warp'"),
    ],
)
def test_mistakes_end_with_one_line_and_status_2(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert collect(checkpoint, tmp_path, *arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_demo_that_is_no_integer_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        collect(checkpoint, tmp_path, "--demo_idx", "first")
    assert exit_.value.code == 2
    assert "--demo_idx" in capsys.readouterr().err
