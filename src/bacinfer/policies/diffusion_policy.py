"""What touches the ``diffusion_policy`` package (https://github.com/real-stanford/diffusion_policy), if installed."""

from __future__ import annotations

import importlib
from typing import Any

INSTALL_HINT = (
    "Install the package diffusion_policy from https://github.com/real-stanford/diffusion_policy and what it needs; "
    "without it, only its low-dimensional transformer policy can be loaded"
)

_POLICY = "diffusion_policy.policy."
_SCHEDULER = "diffusers.schedulers."

CLASSES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("policy",): (
        _POLICY + "diffusion_transformer_lowdim_policy.DiffusionTransformerLowdimPolicy",
        _POLICY + "diffusion_transformer_hybrid_image_policy.DiffusionTransformerHybridImagePolicy",
    ),
    ("policy", "model"): ("diffusion_policy.model.diffusion.transformer_for_diffusion.TransformerForDiffusion",),
    ("policy", "noise_scheduler"): (
        _SCHEDULER + "scheduling_ddpm.DDPMScheduler",
        _SCHEDULER + "scheduling_ddim.DDIMScheduler",
    ),
}
"""What the configuration of a checkpoint may build at which place, without being trusted: what the transformer policies
that Diffusion Policy published are made of. Its other functions can do more than build: one downloads weights."""


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
