"""The commands on a checkpoint of a policy that sees: schedules, results, films, a report, a data set."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from bacinfer.analysis import get_optimal_cache_update_steps
from bacinfer.commands import collect_data, compare, report
from bacinfer.commands import eval as evaluate
from bacinfer.experiments.run_files import read_plain_result
from bacinfer.experiments.store import ResultsStore
from bacinfer.tasks import PushTImageTask
from lerobot_helpers import CAMERA, read_dataset
from tiny_image_policies import write_tiny_image_checkpoint

K = 4
TINY = ["policy.crop_shape=[32,32]", f"policy.num_inference_steps={K}", "task.env_runner.max_steps=8"]


@pytest.fixture(scope="module")
def image_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_image_checkpoint(tmp_path_factory.mktemp("checkpoint") / "image.ckpt", *TINY)


@pytest.fixture(scope="module")
def steps_dir(image_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `bacinfer steps` finds, at two observations of a training start."""
    assets = tmp_path_factory.mktemp("assets") / "pusht_image"
    command = [f"--checkpoint={image_checkpoint}", f"--output_dir={assets}", "--num_caches=2", "--metrics=cosine"]
    assert get_optimal_cache_update_steps.main(command) == 0
    return assets / "original" / "optimal_steps" / "cosine"


def test_eval(image_checkpoint: Path, steps_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"--checkpoint={image_checkpoint}", f"--output_dir={tmp_path}", "--n_test=2", "--latency_calls=2"]
    cache = ["--cache_mode=optimal", f"--optimal_steps_dir={steps_dir}", "--num_caches=2", "--num_bu_blocks=1"]
    assert evaluate.main([*arguments, *cache]) == 0
    rows = {row.method: row for row in ResultsStore(tmp_path).rows()}
    plain, cached = rows["plain"], rows["bac:2:1"]
    assert (plain.task, cached.engine, cached.num_failed) == ("pusht_image", "fused", 0)
    assert (tmp_path / "media" / "side_by_side.mp4").is_file()

    table = capsys.readouterr().out
    assert "encoder + denoising, ms" in table
    benchmark = json.loads((tmp_path / "benchmark_results.json").read_text())
    for row, measured in ((plain, None), (cached, benchmark["fast"])):
        assert row.encoder_p50 is not None
        assert row.denoising_p50 is not None
        assert row.latency_p50 == pytest.approx(row.encoder_p50 + row.denoising_p50, rel=0.5)
        assert f"{1e3 * row.encoder_p50:.1f} + {1e3 * row.denoising_p50:.1f}" in table
        if measured is not None:
            assert measured["latency_encoder"] == row.encoder_p50
            assert measured["latency_denoising"] == row.denoising_p50

    kept = read_plain_result(tmp_path / plain.directory)
    assert (kept.result.cost.latency.encoder, kept.result.cost.latency.denoising) == (
        plain.encoder_p50,
        plain.denoising_p50,
    )
    first = PushTImageTask().episode(11).observation
    for name, values in kept.observations[0].items():
        np.testing.assert_array_equal(values[0], first[name])


def test_compare_and_report(image_checkpoint: Path, tmp_path: Path) -> None:
    arguments = [f"--checkpoint={image_checkpoint}", f"--output_dir={tmp_path}", "--n_test=2", "--latency_calls=1"]
    assert compare.main([*arguments, "--methods=ddim:2+lossless,bac:2:1", "--film"]) == 0
    assert "encoder + denoising, ms" in (tmp_path / "comparison.md").read_text().splitlines()[0]
    assert report.main([str(tmp_path)]) == 0
    page = next(tmp_path.rglob("*.html")).read_text()
    assert "encoder + denoising, ms" in page
    (path,) = tmp_path.rglob("*.csv")
    with path.open() as file:
        entries = list(csv.DictReader(file))
    assert len(entries) == 3
    assert all(float(entry["encoder_p50"]) > 0 and float(entry["denoising_p50"]) > 0 for entry in entries)


def test_collect_data(image_checkpoint: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    arguments = [f"--checkpoint={image_checkpoint}", f"--output_dir={root}", "--num_episodes=1", "--n_envs=1"]
    assert collect_data.main(arguments) == 0
    (episode,) = read_dataset(root)
    assert len(episode) == 8
    first = PushTImageTask().episode(1000).observation
    np.testing.assert_array_equal(episode[0]["observation.state"], first["agent_pos"][-1])
    assert "observation.environment_state" not in episode[0]
    picture = 255 * first["image"][-1].transpose(1, 2, 0)
    assert np.abs(episode[0][CAMERA] - picture).mean() < 4  # as near as the video encoder leaves it
