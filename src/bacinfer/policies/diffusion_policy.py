"""What touches the ``diffusion_policy`` package (https://github.com/real-stanford/diffusion_policy), if installed."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

INSTALL_HINT = (
    "Install the package diffusion_policy from https://github.com/real-stanford/diffusion_policy and what it needs; "
    "without it, only its low-dimensional transformer policy can be loaded"
)

# where the parts of a policy are defined: policies, networks, noise schedulers
_POLICY_PARTS = ("diffusion_policy.policy.", "diffusion_policy.model.", "diffusers.schedulers.")


def names_policy_part(target: Any) -> bool:
    """Whether a dotted name lies in one of the packages that define policies' parts."""
    return isinstance(target, str) and target.startswith(_POLICY_PARTS)


def is_policy_part(found: Any) -> bool:
    """Whether a class or function was defined where policies' parts are, and not only imported there."""
    return (inspect.isclass(found) or inspect.isfunction(found)) and found.__module__.startswith(_POLICY_PARTS)


def find(target: str) -> Any:
    """The object of a dotted name such as ``diffusers.schedulers.scheduling_ddpm.DDPMScheduler``.

    Raises:
        ImportError: there is no such module, or no such name in it.
    """
    module_name, _, name = target.rpartition(".")
    module = importlib.import_module(module_name)
    if not hasattr(module, name):
        raise ImportError(f"{module_name} has no {name}")
    return getattr(module, name)
