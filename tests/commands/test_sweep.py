"""The Hydra application, as a user starts it: two processes through joblib, and going on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from bacinfer.commands import sweep
from bacinfer.experiments.method import parse_method
from bacinfer.experiments.store import ResultsStore

CONFIG = Path(sweep.__file__).parent / "config" / "sweep.yaml"


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two training seeds of one task."""
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        path = Path("checkpoint/pusht/diffusion_policy_transformer") / f"train_{seed}" / "checkpoints" / "latest.ckpt"
        path.parent.mkdir(parents=True)
        shutil.copy(checkpoint, path)
    return tmp_path


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def config(**changes: object) -> DictConfig:
    cfg = OmegaConf.load(CONFIG)
    del cfg.hydra
    return OmegaConf.merge(cfg, changes)


def test_two_processes_and_going_on() -> None:
    common = ("task=pusht", "checkpoint_type=avg", "n_test=1", "latency_calls=1", "threads=1")
    done = run(
        "bacinfer.commands.cli",
        "sweep",
        "-m",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        *common,
        "training_seed=0,1",
        "num_bu_blocks=0,1",
        "num_caches=3",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = ResultsStore("results").rows()
    assert {(row.method, row.training_seed) for row in rows} == {
        (method, seed) for method in ("plain", "blockwise:3", "bac:3:1") for seed in (0, 1)
    }
    assert "block-wise ACS 3" in done.stdout

    more = run("bacinfer.evaluation.sweep", "-m", *common, "seed=0", "num_bu_blocks=0,1", "num_caches=3,4")
    assert more.returncode == 0, more.stderr[-3000:]
    assert ResultsStore("results").rows()[:6] == rows
    assert len(ResultsStore("results").rows()) == 8


def test_a_failing_job_shows() -> None:
    flags = ("checkpoint_type=avg", "n_test=1", "latency_calls=1", "threads=1", "training_seed=7,0")
    done = run("bacinfer.commands.sweep", "-m", *flags, "method=threshold:5")
    assert done.returncode == 1
    assert "no avg checkpoint of pusht, training seed 7" in done.stderr
    assert [row.method for row in ResultsStore("results").rows()] == ["plain", "threshold:5"]


def test_which_checkpoint(workspace: Path) -> None:
    found = sweep.experiment(config(training_seed=1, checkpoint_type="avg"))
    assert sweep.experiment(config(seed=1, checkpoint_type="avg")) == found  # its old name
    assert (found.training_seed, found.checkpoint_type) == (1, "avg")
    assert found.method == parse_method("bac:10:5")
    given = sweep.experiment(config(checkpoint=found.checkpoint, method="ddim:16+bac:8:5"))
    assert (given.training_seed, given.checkpoint_type) == (None, None)
    assert (found.assets_dir, given.assets_dir) == ("assets/pusht/original", None)
    assert given.method == parse_method("ddim:16+bac:8:5")

    shipped = workspace / "assets" / "pusht" / "pusht.ckpt"
    shipped.parent.mkdir(parents=True)
    shutil.move(found.checkpoint, shipped)
    shutil.rmtree("checkpoint")
    assert sweep.experiment(config()).checkpoint == "assets/pusht/pusht.ckpt"
    for given in ({"training_seed": 0}, {"seed": 1}, {"checkpoint_type": "max"}):  # one checkpoint, run again and again
        with pytest.raises(ValueError, match="has no effect, as there is only the shipped checkpoint of pusht"):
            sweep.experiment(config(**given))


def test_disturbed_episodes() -> None:
    assert sweep.experiment(config(training_seed=1, checkpoint_type="avg", disturb=True)).disturb
    assert not sweep.experiment(config(training_seed=1, checkpoint_type="avg")).disturb


def test_half_precision() -> None:
    assert sweep.experiment(config(checkpoint_type="avg", precision="bf16")).precision == "bf16"
    assert sweep.experiment(config(checkpoint_type="avg")).precision is None


def test_a_results_directory_that_cannot_be_recorded() -> None:
    with pytest.raises(ValueError, match="no line break"):
        sweep.job.__wrapped__(config(checkpoint_type="avg", results_dir="two\nlines"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "lift"}, "unknown task lift"),
        ({"checkpoint_type": "best"}, "expected one of max, avg"),
        ({"method": "taylor"}, "no such method"),
        ({"n_test": 0}, "--n_test 0"),
        ({"precision": "fp8"}, "unknown precision 'fp8'; there is bf16, int8"),
        ({"seed": 0, "training_seed": 1}, "seed=0 is the old name of training_seed=1"),
        ({"method": "ddim:4", "num_caches": 10}, "num_caches=10 has no effect with method=ddim:4"),
        ({"method": "ddim:4", "num_bu_blocks": 0, "metric": "l1"}, "num_bu_blocks=0, metric=l1 has no effect"),
        ({"checkpoint": "a.ckpt", "task": "pusht", "checkpoint_type": None}, "task=pusht has no effect"),
        (
            {"checkpoint": "a.ckpt", "seed": 0},
            "training_seed=0, checkpoint_type=avg has no effect with checkpoint=a.ckpt",
        ),
    ],
)
def test_mistakes(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep.experiment(config(**{"checkpoint_type": "avg", **changes}))
