"""Their pre- and postprocessors: those of LeRobot's own policies."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from lerobot.configs.policies import PreTrainedConfig

from bacinfer.lerobot.registry import SUFFIX
from lerobot_policy_bacinfer.configuration_bac import CONFIGURATIONS


def __getattr__(name: str) -> Callable[..., Any]:
    """The function ``make_multi_task_dit_bac_pre_post_processors``, as LeRobot asks for it."""
    for policy_type in CONFIGURATIONS:
        if name == f"make_{policy_type}{SUFFIX}_pre_post_processors":
            module = PreTrainedConfig.get_choice_class(policy_type).__module__.replace("configuration_", "processor_")
            return getattr(importlib.import_module(module), f"make_{policy_type}_pre_post_processors")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
