"""What experiments evaluate: a policy and its task, from a checkpoint; the last one loaded is kept."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bacinfer.files import read_json
from bacinfer.lerobot.installation import CONFIG, needing_lerobot
from bacinfer.policies import build_policy, read_checkpoint
from bacinfer.tasks import Task, make_task


@lru_cache(maxsize=1)
def load_subject(
    path: str, sha256: str, device: str, env: str | None, trust_checkpoint: bool
) -> tuple[Any, Task, DictConfig]:
    """The plain policy of a checkpoint with this digest, its task and its configuration.

    Args:
        env: Of a checkpoint of LeRobot's: the environment, as `lerobot.environment` spells it.
    """
    if env is not None:
        policy, task = needing_lerobot("environment").load_subject(Path(path), env, device)
        return policy, task, OmegaConf.create(read_json(Path(path) / CONFIG))
    checkpoint = read_checkpoint(path, trust_checkpoint=trust_checkpoint)
    policy = build_policy(checkpoint, device)
    return policy, make_task(checkpoint.cfg, trust_checkpoint=trust_checkpoint), checkpoint.cfg
