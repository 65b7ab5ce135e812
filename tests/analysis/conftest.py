"""Fixtures of the analysis: a task without a simulator, and a small Push-T checkpoint for the commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from analysis_helpers import FakeTask

from bacinfer.assets import RunAssets
from tiny_policies import write_tiny_checkpoint


@pytest.fixture
def task() -> FakeTask:
    return FakeTask()


@pytest.fixture
def run(tmp_path: Path) -> RunAssets:
    return RunAssets(tmp_path / "assets" / "original")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Push-T policy of two layers with random weights, K = 10."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny.ckpt")
