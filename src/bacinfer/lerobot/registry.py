"""Which adapter a policy has: by its class, or by the first of its bases that has one."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import TYPE_CHECKING

from bacinfer.core.handle import PolicyHandle

if TYPE_CHECKING:
    from lerobot.policies.pretrained import PreTrainedPolicy

_ADAPTERS = {  # the class of a policy to its module in `bacinfer.lerobot.adapters`, whose `handle` takes the policy
    "lerobot.policies.multi_task_dit.modeling_multi_task_dit.MultiTaskDiTPolicy": "multi_task_dit",
    "lerobot.policies.xvla.modeling_xvla.XVLAPolicy": "xvla",
    "lerobot.policies.smolvla.modeling_smolvla.SmolVLAPolicy": "smolvla",
    "lerobot.policies.pi0.modeling_pi0.PI0Policy": "pi",
    "lerobot.policies.pi05.modeling_pi05.PI05Policy": "pi",
    "lerobot.policies.evo1.modeling_evo1.Evo1Policy": "evo1",
    "lerobot.policies.groot.modeling_groot.GrootPolicy": "groot",
    "lerobot.policies.vla_jepa.modeling_vla_jepa.VLAJEPAPolicy": "vla_jepa",
    "lerobot.policies.fastwam.modeling_fastwam.FastWAMPolicy": "fastwam",
}

SUPPORTED_TYPES = tuple(name.split(".")[2] for name in _ADAPTERS)
"""The types of the supported policies, as LeRobot's configurations spell them."""

SUFFIX = "_bac"
"""What is added to the type of a policy whose checkpoint holds a plan (see the plugin lerobot_policy_bacinfer)."""


def adapter_of(policy_class: type) -> str:
    """The module in `bacinfer.lerobot.adapters` for a class of policies.

    Raises:
        TypeError: there is none.
    """
    for base in policy_class.__mro__:
        adapter = _ADAPTERS.get(f"{base.__module__}.{base.__qualname__}")
        if adapter is not None:
            return adapter
    raise TypeError(
        f"{policy_class.__module__}.{policy_class.__qualname__} is no LeRobot policy that can be cached; those of type "
        f"{', '.join(SUPPORTED_TYPES)} can. For another one with a transformer and a denoising loop, write a "
        f"bacinfer.PolicyHandle"
    )


def handle(policy: PreTrainedPolicy) -> PolicyHandle:
    """What a policy of LeRobot's is to bacinfer, for every function that takes a `bacinfer.PolicyHandle`.

    Raises:
        TypeError: there is no adapter for it.
        ValueError: lerobot's code is another than its adapter was written for.
    """
    adapter = importlib.import_module(f"bacinfer.lerobot.adapters.{adapter_of(type(policy))}")
    return replace(adapter.handle(policy), n_action_steps=policy.config.n_action_steps)
