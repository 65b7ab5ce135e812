"""The policies: LeRobot's own, which run by their configuration's plan once their weights are loaded."""

from __future__ import annotations

from typing import Any

from lerobot.policies.factory import get_policy_class

import bacinfer.lerobot
from bacinfer import SamplingPlan
from bacinfer.lerobot.registry import SUFFIX
from lerobot_policy_bacinfer.configuration_bac import CONFIGURATIONS


class _WithPlan:
    """What is added to a policy's class."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """The policy of a checkpoint, with its plan applied.

        Raises:
            ValueError: it has no plan, or one that was made for another policy.
        """
        policy = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        if not policy.config.bac_plan:
            raise ValueError(
                f"the checkpoint of type {policy.config.type} has no plan in its config.json (bac_plan); write it with "
                f"`bacinfer lerobot export`"
            )
        return bacinfer.lerobot.apply(policy, SamplingPlan.from_json(policy.config.bac_plan))


def __getattr__(name: str) -> type:
    """The class ``MultiTaskDiTBacPolicy``, as LeRobot asks for it: its base is imported only where it is needed."""
    for policy_type, config_class in CONFIGURATIONS.items():
        if name == config_class.__name__.removesuffix("Config") + "Policy":
            attributes = {"config_class": config_class, "name": policy_type + SUFFIX, "__module__": __name__}
            globals()[name] = type(name, (_WithPlan, get_policy_class(policy_type)), attributes)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
