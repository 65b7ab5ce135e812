"""The configurations: those of LeRobot's own policies, and a plan."""

from __future__ import annotations

from dataclasses import make_dataclass
from typing import Any

import lerobot.policies  # noqa: F401 (registers LeRobot's own types)
from lerobot.configs.policies import PreTrainedConfig

from bacinfer.lerobot.registry import SUFFIX, SUPPORTED_TYPES


def _with_plan(policy_type: str) -> type[PreTrainedConfig]:
    """The configuration of a type with the field ``bac_plan``, what `SamplingPlan.to_json` wrote.

    LeRobot finds the policy by the names of this class and of this module.
    """
    base: Any = PreTrainedConfig.get_choice_class(policy_type)
    name = base.__name__.removesuffix("Config") + "BacConfig"
    config_class = make_dataclass(name, [("bac_plan", str, "")], bases=(base,))
    return PreTrainedConfig.register_subclass(policy_type + SUFFIX)(config_class)


CONFIGURATIONS = {policy_type: _with_plan(policy_type) for policy_type in SUPPORTED_TYPES}
"""The types of LeRobot's own policies to the configurations with a plan."""

globals().update({config_class.__name__: config_class for config_class in CONFIGURATIONS.values()})
