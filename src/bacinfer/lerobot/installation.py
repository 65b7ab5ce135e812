"""What can be said of LeRobot where it may not be installed."""

from __future__ import annotations

import importlib
from types import ModuleType

CONFIG, WEIGHTS = "config.json", "model.safetensors"
"""The files of a checkpoint's directory."""


def needing_lerobot(name: str) -> ModuleType:
    """The module of that name in this package, which imports lerobot.

    Raises:
        ImportError: lerobot is not installed.
    """
    try:
        return importlib.import_module(f"bacinfer.lerobot.{name}")
    except ModuleNotFoundError as error:
        if error.name != "lerobot":
            raise
        raise ImportError(
            "a LeRobot checkpoint needs lerobot, which is not installed here: pip install lerobot==0.6.1, with the "
            "extra of the policy's type, for Python 3.12 or later"
        ) from error
