"""The demonstrations that a configuration's task is trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig

from bacinfer.tasks import task_name
from bacinfer.training.block_pushing_demonstrations import record_block_pushing
from bacinfer.training.dataset import Demonstrations, TrainingData, read_demonstrations, read_pusht_demonstrations
from bacinfer.training.expert_demonstrations import check_recorded, record_demonstrations
from bacinfer.training.pusht_images import read_pusht_images

EEF_TARGET = slice(8, 10)
"""Where an observation of block pushing has the effector's target, which also tells what it did last."""


def load_demonstrations(cfg: DictConfig, path: Path | None = None) -> TrainingData:
    """The demonstrations of a configuration's task, at its own place or at ``path``.

    Those of a scripted expert are recorded if there are none yet, and pictures drawn.

    Raises:
        ValueError: those that are there were recorded with other settings.
    """
    dataset = cfg.task.dataset
    if "shape_meta" in cfg.task:
        seen = cfg.n_obs_steps if cfg.obs_as_cond else cfg.horizon
        return read_pusht_images(
            path or dataset.zarr_path, cfg.training.frames_dir, n_obs_steps=seen, noise_draws=cfg.training.noise_draws
        )
    if "num_demonstrations" in dataset:
        demonstrations = _demonstrations_of_an_expert(cfg, path)
    else:
        read = read_pusht_demonstrations if task_name(cfg) == "pusht" else read_demonstrations
        demonstrations = read(path or dataset.zarr_path)
    if not cfg.task.get("obs_eef_target", True):
        demonstrations.obs[:, EEF_TARGET] = 0  # as the runner of block pushing shows it then
    return demonstrations


def _demonstrations_of_an_expert(cfg: DictConfig, path: Path | None) -> Demonstrations:
    dataset = cfg.task.dataset
    if "env_name" in cfg.task.env_runner:
        path = path or Path(dataset.path)
        settings = {"env_name": cfg.task.env_runner.env_name, "disturbed": dataset.disturbed}
        record: Callable[..., None] = record_demonstrations
    else:
        path, settings, record = path or Path(dataset.zarr_path), {}, record_block_pushing
    settings |= {"count": dataset.num_demonstrations}
    if path.exists():
        check_recorded(path, settings)
    else:
        record(path, **settings)
    return read_demonstrations(path)
