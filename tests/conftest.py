"""Fixtures that several test modules share."""

from __future__ import annotations

import pytest
import torch

from helpers import TinyPolicy


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tests run side by side in several processes; tiny models gain nothing from threads."""
    torch.set_num_threads(1)


@pytest.fixture
def policy() -> TinyPolicy:
    return TinyPolicy()
