"""The configuration of a training run: ``config/train.yaml``, and what a user changes of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

CONFIG_DIR = Path(__file__).parent / "config"


def read_config(overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration ``config/train.yaml`` with ``overrides`` (``key=value``), dependent entries filled in.

    Raises:
        ValueError: an override does not name an entry, or is none.
    """
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base=None):
            cfg = compose("train", overrides=list(overrides))
    except HydraException as error:
        raise ValueError(str(error).replace("\n", " ")) from error
    dependent = {
        "task.dataset.pad_before": cfg.n_obs_steps - 1 + cfg.n_latency_steps,
        "task.dataset.pad_after": cfg.n_action_steps - 1,
    }
    if "model" in cfg.policy:  # a policy that sees pictures makes its model itself
        dependent |= {
            "policy.model.input_dim": cfg.action_dim + (0 if cfg.obs_as_cond else cfg.obs_dim),
            "policy.model.cond_dim": cfg.obs_dim if cfg.obs_as_cond else 0,
        }
    for key, value in dependent.items():
        if OmegaConf.select(cfg, key) is None:
            OmegaConf.update(cfg, key, value)
    OmegaConf.resolve(cfg)
    return cfg
