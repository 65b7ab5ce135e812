"""Fixtures that several test modules share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import interpreted_triton  # noqa: F401  # before anything imports Triton
from bacinfer.policies import load_policy
from helpers import TinyPolicy
from small_experiments import MAX_STEPS, write_tiny_steps
from tiny_policies import write_tiny_checkpoint


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tests run side by side in several processes; tiny models gain nothing from threads."""
    torch.set_num_threads(1)


@pytest.fixture
def policy() -> TinyPolicy:
    return TinyPolicy()


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
