"""Which methods are worth trying on a policy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bacinfer.core.blocks import find_blocks
from bacinfer.core.handle import PolicyHandle
from bacinfer.experiments.method import Method, parse_method

OWN_STEPS = (50, 25, 20, 16, 12, 10, 8, 6, 5, 4, 3, 2)
DDIM_STEPS = (16, 10, 5)
DPM_STEPS = (10, 8, 6, 5, 4, 3)
STOCHASTIC_DPM_STEPS = (16,)
WARM_STARTS = {
    ("ddim", 10): ((0.3, 2), (0.4, 2), (0.4, 3), (0.5, 4)),
    ("dpm", 6): ((0.3, 3), (0.4, 3), (0.4, 4), (0.5, 4), (0.6, 5)),
}
"""After which first call: from which share of the training timesteps, in how many steps."""
CACHES = ("bac:10:5", "own:20+bac:7:5", "own:10+uniform:5")


def default_methods(policy: Any, *, stateful: bool) -> list[Method]:
    """Methods of all kinds and costs that fit a plain policy; those that keep state between calls where they may.

    Raises:
        ValueError: a handle's plans cannot keep state.
    """
    handle = PolicyHandle.of(policy)
    if stateful and handle is policy:
        raise ValueError(
            "warm starts replace the denoising loop of a policy that they know, and a handle names none: calibrate it "
            "without stateful"
        )
    scheduler: Any = None if handle.scheduler is None else getattr(*handle.scheduler, None)
    num_steps = handle.num_own_steps
    specs = [f"own:{n}" for n in OWN_STEPS if n < num_steps and handle.num_steps is not None]
    if hasattr(scheduler, "config"):
        num_levels = scheduler.config["num_train_timesteps"]
        samplers = (("ddim:{}", DDIM_STEPS), ("dpm:{}", DPM_STEPS), ("dpm:{}:1", STOCHASTIC_DPM_STEPS))
        specs += [spec.format(n) for spec, numbers in samplers for n in numbers if n < num_levels]
        if stateful:
            specs += _warm_starts(num_levels)
    num_blocks = len(find_blocks(handle.model))
    caches = [method for method in map(parse_method, CACHES) if _has_place(method, handle, num_blocks)]
    return [*map(parse_method, specs), *caches]


def _warm_starts(num_levels: int) -> Iterator[str]:
    for (kind, num_steps), starts in WARM_STARTS.items():
        for share, count in starts:
            start = round(share * num_levels)
            if count <= start + 1:
                yield f"{kind}:{min(num_steps, num_levels)}+warm:{start}:{count}"


def _has_place(method: Method, handle: PolicyHandle, num_blocks: int) -> bool:
    """Whether a policy has the steps and the blocks for a cache."""
    if method.sampler is not None and handle.num_steps is None:
        return False
    most = handle.num_own_steps
    num_steps = most if method.sampler is None else method.sampler.num_steps
    return num_steps <= most and (method.num_caches or 0) < num_steps and (method.num_bu_blocks or 0) <= num_blocks
