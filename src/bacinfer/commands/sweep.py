"""Many evaluations, in this process, in several, or on a cluster: a Hydra application.

    bacinfer sweep -m task=pusht num_caches=5,10,20 num_bu_blocks=0,3,5 noise_seed=0,1,2

Hydra's launchers decide where the jobs run (``hydra/launcher=joblib``, ``submitit_slurm``, ``ray``). All of them add
their runs to `results_dir`; running the same command again adds what is missing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from bacinfer.commands.options import DEFAULT_BU_BLOCKS, DEFAULT_NUM_CACHES
from bacinfer.core.cache_request import DEFAULT_METRIC
from bacinfer.experiments.experiment import Experiment, run
from bacinfer.experiments.method import Method, parse_method
from bacinfer.experiments.store import ResultsStore
from bacinfer.files import check_path
from bacinfer.measurement.tables import format_table
from bacinfer.report.table import METHOD_HEADER, method_cells
from bacinfer.tasks.checkpoints import (
    ASSETS_ROOT,
    CHECKPOINT_TYPES,
    find_checkpoint,
    shipped_checkpoint,
    training_directories,
)
from bacinfer.tasks.table import tasks_named

_BAC = {"num_caches": DEFAULT_NUM_CACHES, "num_bu_blocks": DEFAULT_BU_BLOCKS, "metric": DEFAULT_METRIC}
_DEFAULTS = {"task": "pusht", **_BAC}


def experiment(cfg: DictConfig) -> Experiment:
    """The experiment of one job.

    Raises:
        ValueError: an unknown task, method or checkpoint type, numbers that no experiment can have, or an entry that
            has no effect beside another.
        FileNotFoundError: the task has no such checkpoint.
    """
    cfg = cfg.copy()
    if cfg.seed is not None:
        if cfg.training_seed is not None:
            raise ValueError(f"seed={cfg.seed} is the old name of training_seed={cfg.training_seed}: leave it out")
        cfg.training_seed = cfg.seed
    _check_effect(cfg, "checkpoint", ("task", "training_seed", "checkpoint_type"))
    _check_effect(cfg, "method", tuple(_BAC))
    cfg.update({name: value for name, value in _DEFAULTS.items() if cfg[name] is None})
    source = _find_checkpoint(cfg) if cfg.checkpoint is None else {"checkpoint": cfg.checkpoint}
    assets_dir = cfg.assets_dir
    if assets_dir is None and cfg.checkpoint is None:
        assets_dir = str(ASSETS_ROOT / cfg.task / "original")
    seeds = ("first_episode_seed", "noise_seed")
    names = (*seeds, "n_test", "n_envs", "disturb", "latency_calls", "device", "engine", "precision")
    return Experiment(
        **source,
        method=Method("bac", **{name: cfg[name] for name in _BAC}) if cfg.method is None else parse_method(cfg.method),
        assets_dir=assets_dir,
        **{name: cfg[name] for name in names},
    )


def _check_effect(cfg: DictConfig, chosen: str, others: Sequence[str]) -> None:
    """Raises ValueError if entries are given that another one, which is given, leaves without effect."""
    given = [f"{name}={cfg[name]}" for name in others if cfg[name] is not None]
    if cfg[chosen] is not None and given:
        raise ValueError(f"{', '.join(given)} has no effect with {chosen}={cfg[chosen]}: leave it out")


def _find_checkpoint(cfg: DictConfig) -> dict[str, Any]:
    """Which checkpoint of a task, as `Experiment` has it: the shipped one stands in where there is no other."""
    (task,) = tasks_named([cfg.task])
    kind = CHECKPOINT_TYPES[0] if cfg.checkpoint_type is None else cfg.checkpoint_type
    if kind not in CHECKPOINT_TYPES:
        raise ValueError(f"checkpoint_type {kind!r}: expected one of {', '.join(CHECKPOINT_TYPES)}")
    seed = 0 if cfg.training_seed is None else cfg.training_seed
    checkpoint, shipped = find_checkpoint(task.name, seed, kind), shipped_checkpoint(task.name)
    if checkpoint is not None:
        return {"checkpoint": str(checkpoint), "training_seed": seed, "checkpoint_type": kind}
    if shipped is None or training_directories(task.name):
        raise FileNotFoundError(
            f"no {kind} checkpoint of {task.name}, training seed {seed}: expected one in "
            f"checkpoint/[low_dim/]{task.name}/diffusion_policy_transformer/train_{seed}/checkpoints"
        )
    given = [f"{name}={cfg[name]}" for name in ("training_seed", "checkpoint_type") if cfg[name] is not None]
    if given:
        raise ValueError(
            f"{', '.join(given)} has no effect, as there is only the shipped checkpoint of {task.name}, {shipped}: "
            "leave it out; first_episode_seed=... changes the episodes, noise_seed=... the sampling noise"
        )
    return {"checkpoint": str(shipped)}


class PrintTable(Callback):
    """At the end of a sweep, prints the table of results, the rows of earlier sweeps included."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        rows = ResultsStore(config.results_dir).rows()
        seeds = [["-" if row.training_seed is None else str(row.training_seed), str(row.noise_seed)] for row in rows]
        cells = [[row.task, *seed, *method_cells(row)] for row, seed in zip(rows, seeds, strict=True)]
        print(format_table(["task", "training seed", "noise seed", *METHOD_HEADER], cells))


@hydra.main(version_base=None, config_path=str(Path(__file__).parent / "config"), config_name="sweep")
def job(cfg: DictConfig) -> float | None:
    """One evaluation; its score is what a sweeper may optimise."""
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    return run(experiment(cfg), check_path(cfg.results_dir), force=cfg.force).score


def main(argv: Sequence[str] | None = None) -> int:
    if argv is not None:
        sys.argv[1:] = argv
    job()
    return 0


if __name__ == "__main__":
    sys.exit(main())
