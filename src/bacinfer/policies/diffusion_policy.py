"""What touches the ``diffusion_policy`` package (https://github.com/real-stanford/diffusion_policy), if installed."""

from __future__ import annotations

import importlib
from typing import Any

INSTALL_HINT = (
    "Install the package diffusion_policy from https://github.com/real-stanford/diffusion_policy and what it needs; "
    "without it, only its transformer policies can be loaded, low-dimensional and image"
)

_LOWDIM = "diffusion_policy.policy.diffusion_transformer_lowdim_policy.DiffusionTransformerLowdimPolicy"
_IMAGE = "diffusion_policy.policy.diffusion_transformer_hybrid_image_policy.DiffusionTransformerHybridImagePolicy"
_TRANSFORMER = "diffusion_policy.model.diffusion.transformer_for_diffusion.TransformerForDiffusion"
_SCHEDULERS = (
    "diffusers.schedulers.scheduling_ddpm.DDPMScheduler",
    "diffusers.schedulers.scheduling_ddim.DDIMScheduler",
)

POLICIES: dict[str, dict[str, tuple[str, ...]]] = {
    _LOWDIM: {"model": (_TRANSFORMER,), "noise_scheduler": _SCHEDULERS},
    _IMAGE: {"noise_scheduler": _SCHEDULERS},
}
"""The classes of the transformer policies that Diffusion Policy published, and those of their parts.

The configuration of a checkpoint may name them without being trusted. Other functions of the package can do more than
build: one downloads weights."""


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
