"""Made-up rows of results, and schedules of the small Push-T policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bacinfer.assets import write_block_steps
from bacinfer.core.blocks import find_blocks
from bacinfer.experiments.store import _TYPES, Row
from bacinfer.policies import load_policy
from tiny_policies import K

MAX_STEPS = 24

_VALUES: dict[Any, Any] = {str: "text", int: 3, float: 0.25, bool: False}


def make_row(key: str = "a", **values: Any) -> Row:
    """A row of results with made-up values."""
    defaults = {
        name: next((value for kind, value in _VALUES.items() if kind is wanted), None)
        for name, wanted in _TYPES.items()
    }
    return Row(**{**defaults, "key": key, **values})


def write_tiny_steps(directory: Path, checkpoint: Path) -> None:
    for block in find_blocks(load_policy(checkpoint).model):
        for steps in ([0, 2, 6], [0, 1, 3, 5, 8]):
            write_block_steps(directory, block.key, "cosine", steps, K)
