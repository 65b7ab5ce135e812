"""The cache and the analysis on the real package's policy, with its own runner. Skipped where it is not installed."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import dill
import pytest

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
pytest.importorskip("diffusion_policy.env_runner.pusht_keypoints_runner", reason="needs the diffusion_policy package")

import torch

from bacinfer import FastDiffusionPolicy
from bacinfer.analysis import get_optimal_cache_update_steps as analysis
from bacinfer.commands import eval as evaluate
from bacinfer.policies import Checkpoint, read_checkpoint
from bacinfer.policies.checkpoint import create_policy
from bacinfer.tasks import RunnerTask, make_task
from tiny_policies import VARIANTS, fitted_normalizer, observations, randomise, tiny_config, write_tiny_checkpoint


def act(policy) -> torch.Tensor:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    with torch.no_grad():
        return policy.predict_action(observations())["action_pred"]


@pytest.fixture(params=VARIANTS)
def policy(request):  # type: ignore[no-untyped-def]
    policy = randomise(create_policy(Checkpoint(Path("none"), tiny_config(request.param), {}))).eval()
    assert type(policy).__module__.startswith("diffusion_policy.")
    policy.set_normalizer(fitted_normalizer())
    return policy


def test_caching_is_exact_where_it_must_be(policy) -> None:  # type: ignore[no-untyped-def]
    plain = act(policy)
    FastDiffusionPolicy.apply_cache(policy, cache_threshold=1, engine="eager")
    assert torch.equal(act(policy), plain)
    cached = act(FastDiffusionPolicy.apply_cache(policy, cache_threshold=4, engine="eager"))
    assert not torch.equal(cached, plain)
    for copied in (copy.deepcopy(policy), dill.loads(dill.dumps(policy))):
        assert torch.equal(act(copied), cached)
        assert torch.equal(act(FastDiffusionPolicy.remove_cache(copied)), plain)
    assert torch.equal(act(FastDiffusionPolicy.remove_cache(policy)), plain)


def test_analysis_and_evaluation_with_its_own_runner(tmp_path: Path) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path / "tiny.ckpt", "task.env_runner.max_steps=16")
    assert isinstance(make_task(read_checkpoint(checkpoint).cfg), RunnerTask)
    flags = ["-c", str(checkpoint), "-o", str(tmp_path / "pusht"), "--num_caches", "4", "--metrics", "cosine"]
    assert analysis.main([*flags, "--num_demos", "2"]) == 0
    steps_dir = tmp_path / "pusht" / "original" / "optimal_steps" / "cosine"
    output_dir = tmp_path / "out"
    flags = ["-c", str(checkpoint), "-o", str(output_dir), "--n_test", "2", "--latency_calls", "1"]
    flags += ["--cache_mode", "optimal", "--optimal_steps_dir", str(steps_dir), "--num_caches", "4"]
    assert evaluate.main([*flags, "--num_bu_blocks", "1", "--debug"]) == 0
    assert (output_dir / "eval_results.json").is_file()
    assert len(list(output_dir.glob("runs/*/media/100000.mp4"))) == 2
    assert (output_dir / "media" / "side_by_side.mp4").is_file()
