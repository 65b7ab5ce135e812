"""One cached sample beside the plain one."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from bacinfer import assets, files
from bacinfer.analysis.run_policy import main


def run(checkpoint: Path, out: Path, *arguments: str) -> dict[str, object]:
    assert main(["-c", str(checkpoint), "-o", str(out), *arguments]) == 0
    return json.loads((out / "summary.json").read_text())


def test_without_a_cache_nothing_differs(checkpoint: Path, tmp_path: Path) -> None:
    summary = run(checkpoint, tmp_path)
    assert summary["cache_mode"] == "original"
    assert summary["max_action_difference"] == 0
    assert summary["flops_fraction"] == 1


def test_a_cache_is_counted_timed_and_compared(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = run(checkpoint, tmp_path, "--cache_mode", "threshold", "--cache_threshold", "5", "--demo_idx", "12")
    assert (summary["cache_mode"], summary["demo_idx"]) == ("threshold", 12)
    assert summary["updates"] == {
        f"decoder.layers.{n}_{kind}": 2 for n in range(2) for kind in ("sa_block", "mha_block", "ff_block")
    }
    assert 0 < summary["rms_action_difference"] <= summary["max_action_difference"]  # type: ignore[operator]
    assert summary["cached_seconds"] > 0  # type: ignore[operator]
    actions, start = files.read_arrays(tmp_path / "actions.npz")
    assert actions["action"].shape == (1, 8, 2)
    assert start["demo_idx"] == 12
    assert "2.0 updates a block in 10 steps" in capsys.readouterr().out


def test_a_directory_of_steps_is_used_without_a_mode(checkpoint: Path, tmp_path: Path) -> None:
    run_assets = assets.RunAssets(tmp_path / "pusht" / "original")
    for n, kind in itertools.product(range(2), ("sa_block", "mha_block", "ff_block")):
        block = f"decoder.layers.{n}_{kind}"
        assets.write_block_steps(run_assets.steps_dir("cosine"), block, "cosine", [0, 3], 10)
    flags = ["--optimal_steps_dir", str(run_assets.steps_dir("cosine")), "--num_caches", "2"]
    summary = run(checkpoint, tmp_path / "out", *flags)
    assert summary["cache_mode"] == "optimal"
    assert summary["cache_arguments"] == {
        "num_caches": 2,
        "metric": "cosine",
        "num_bu_blocks": 0,
        "optimal_steps_dir": str(run_assets.steps_dir("cosine")),
    }
    assert summary["engine"] in ("fused", "eager")
    assert set(summary["updates"].values()) == {3}  # type: ignore[attr-defined]


def test_equal_seeds_give_equal_actions(checkpoint: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run(checkpoint, tmp_path / name, "--random_seed", seed)
    a, b, c = (files.read_arrays(tmp_path / name / "actions.npz")[0]["action_pred"] for name in "abc")
    assert (a == b).all()
    assert (a != c).any()
