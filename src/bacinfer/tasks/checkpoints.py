"""Where the checkpoints of a task lie, found by listing.

::

    checkpoint/[low_dim/]<task>/diffusion_policy_transformer/train_<seed>/checkpoints/
        latest.ckpt                          type avg
        epoch=0650-test_mean_score=1.000.ckpt    type max: the best score
    assets/<task>/*.ckpt                     shipped with the project
"""

from __future__ import annotations

import re
from pathlib import Path

CHECKPOINT_ROOT = Path("checkpoint")
ASSETS_ROOT = Path("assets")
CHECKPOINT_TYPES = ("max", "avg")

_SCORED = re.compile(r"epoch=(\d+)-test_mean_score=(\d+(?:\.\d+)?)\.ckpt")


def training_directories(task: str) -> list[Path]:
    """The ``train_<seed>/checkpoints`` directories of a task."""
    roots = (CHECKPOINT_ROOT / task, CHECKPOINT_ROOT / "low_dim" / task)
    return [path for root in roots for path in sorted(root.glob("diffusion_policy_transformer/train_*/checkpoints"))]


def find_checkpoint(task: str, seed: int, checkpoint_type: str) -> Path | None:
    """The checkpoint of a training seed; None if there is none. Of equal best scores the later epoch counts."""
    directories = [path for path in training_directories(task) if path.parent.name == f"train_{seed}"]
    files = [path for directory in directories for path in sorted(directory.glob("*.ckpt"))]
    if checkpoint_type == "avg":
        return next((path for path in files if path.name == "latest.ckpt"), None)
    scored = [(float(match[2]), int(match[1]), path) for path in files if (match := _SCORED.fullmatch(path.name))]
    return max(scored)[2] if scored else None


def shipped_checkpoint(task: str) -> Path | None:
    """The checkpoint that the project ships for a task, if it does."""
    return next(iter(sorted((ASSETS_ROOT / task).glob("*.ckpt"))), None)
