"""A small Push-T checkpoint with random weights, and a directory with its schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bacinfer.assets import write_steps
from bacinfer.core.blocks import find_blocks
from bacinfer.evaluation.results_table import _TYPES, Row
from bacinfer.policies import load_policy
from tiny_policies import K, write_tiny_checkpoint

MAX_STEPS = 24

_VALUES: dict[Any, Any] = {str: "text", int: 3, float: 0.25}


def make_row(key: str = "a", **values: Any) -> Row:
    """A row of the results table with made-up values."""
    defaults = {
        name: next((value for kind, value in _VALUES.items() if kind is wanted), None)
        for name, wanted in _TYPES.items()
    }
    return Row(**{**defaults, "key": key, **values})


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(
        tmp_path_factory.mktemp("checkpoint") / "tiny.ckpt", f"task.env_runner.max_steps={MAX_STEPS}"
    )


@pytest.fixture
def pusht_policy(checkpoint: Path) -> Any:
    return load_policy(checkpoint)


@pytest.fixture(scope="session")
def steps_dir(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Schedules for num_caches 3 and 5, as the analysis writes them."""
    directory = tmp_path_factory.mktemp("assets") / "pusht" / "original" / "optimal_steps" / "cosine"
    write_tiny_steps(directory, checkpoint)
    return directory


def write_tiny_steps(directory: Path, checkpoint: Path) -> None:
    for block in find_blocks(load_policy(checkpoint).model):
        for steps in ([0, 2, 6], [0, 1, 3, 5, 8]):
            write_steps(directory, block.module_name, "cosine", steps, K)
