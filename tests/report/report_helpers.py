"""A results directory that was never evaluated, with all that a report shows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from bacinfer.analysis.block_selection import write_selections
from bacinfer.assets import RunAssets, write_by_block
from bacinfer.core.plan import SamplingPlan
from bacinfer.core.schedule import CacheSchedule
from bacinfer.experiments.run_files import PLAN_FILE, SCORES_FILE
from bacinfer.experiments.store import ResultsStore, Row
from bacinfer.files import write_json
from bacinfer.tasks.video import open_video
from small_experiments import make_row

K = 20
BLOCKS = [f"decoder.layers.{layer}_{kind}" for layer in range(2) for kind in ("sa_block", "mha_block", "ff_block")]
SELECTED = "decoder.layers.1_ff_block"
ASSETS = "assets/tiny/original"
FIRST_SEED = 100_000
SCHEDULE = CacheSchedule(K, {block: range(0, K, 4 + n) for n, block in enumerate(BLOCKS)}, "BAC 5")
MEASURED = {
    "task": "pusht",
    "checkpoint": "checkpoint/tiny.ckpt",
    "checkpoint_sha256": "0123456789abcdef",
    "num_inference_steps": K,
    "first_episode_seed": FIRST_SEED,
    "n_test": 50,
    "hardware": "a computer",
    "device": "cpu",
    "score_low": 0.2,
    "score_high": 0.3,
    "finished": "2026-01-02T03:04:05+00:00",
}


def plain_row(key: str = "plain") -> Row:
    plain = {"label": "plain", "method": "plain", "flops": 10**9, "speedup": 1.0}
    return make_row(key, **MEASURED, **plain)


def bac_row(key: str = "bac", **values: object) -> Row:
    bac = {"label": "BAC 5, BU 1", "method": "bac:5:1", "num_caches": 5, "num_bu_blocks": 1, "metric": "cosine"}
    bac |= {"flops": 10**8, "speedup": 4.0}
    return make_row(key, assets=ASSETS, engine="eager", **{**MEASURED, **bac, **values})


def write_table(results_dir: Path, rows: Sequence[Row]) -> None:
    """The rows alone, in this order."""
    for n, row in enumerate(rows):
        ResultsStore(results_dir).write(replace(row, finished=f"{row.finished}{n:04}"))


def similarity(n: int) -> np.ndarray:
    """The matrix of the n-th block: 1 / (1 + |i - j|), shifted so that blocks differ."""
    steps = np.arange(K)
    return 1 / (1 + np.abs(steps[:, None] - steps)) - 0.01 * n


def write_assets(results_dir: Path) -> None:
    run = RunAssets(results_dir / ASSETS)
    arrays = {f"{block}/cosine": similarity(n) for n, block in enumerate(BLOCKS)}
    write_by_block(run.similarity_matrices, arrays, BLOCKS)
    write_selections(run, {block: float(n + 1) for n, block in enumerate(BLOCKS)}, 1)


def write_run(results_dir: Path, row: Row, *, filmed: bool = False) -> None:
    directory = results_dir / row.directory
    if row.engine is not None:
        SamplingPlan(SCHEDULE).save(directory / PLAN_FILE)
    write_json(directory / SCORES_FILE, {"scores": {str(FIRST_SEED): 0.5}})
    if filmed:
        with open_video(directory / "media" / f"{FIRST_SEED}.mp4") as video:
            for shade in range(0, 250, 25):
                video.append(np.full((32, 32, 3), shade, np.uint8))


def write_results(results_dir: Path) -> Path:
    """Two filmed runs, with their assets."""
    rows = [plain_row(), bac_row()]
    write_table(results_dir, rows)
    write_assets(results_dir)
    for row in rows:
        write_run(results_dir, row, filmed=True)
    return results_dir


def write_many_results(results_dir: Path, count: int = 500) -> Path:
    """A sweep of 500 runs on four checkpoints, each run with a schedule of its own."""
    rows = []
    for n in range(count):
        values = {"score": 0.2 + 0.0001 * n, "speedup": 1 + n / 10, "flops": 10**9 + 10**6 * n}
        method = {"num_caches": n, "label": f"BAC {n}, BU 1", "checkpoint_sha256": f"{n % 4}" * 64}
        rows.append(bac_row(f"run-{n}", **values, **method))
    write_table(results_dir, rows)
    write_assets(results_dir)
    for row in rows:
        write_run(results_dir, row)
    return results_dir


def read_map(html: str) -> dict[str, object]:
    """The data of the first schedule on a page."""
    return json.loads(html.split('<script type="application/json">')[1].split("</script>")[0])
