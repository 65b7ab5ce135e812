"""Diffusion Policy's exponential moving average of a policy's weights, computed by diffusers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from diffusers.training_utils import EMAModel


def make_ema(
    parameters: Iterable[torch.nn.Parameter],
    update_after_step: int,
    inv_gamma: float,
    power: float,
    min_value: float,
    max_value: float,
) -> EMAModel:
    """The average of a policy's weights with Diffusion Policy's arguments, and with its decay at every step.

    Diffusion Policy counts optimisation steps from 0, diffusers from 1: so its average starts a step later.
    """
    return EMAModel(
        parameters,
        decay=max_value,
        min_decay=min_value,
        update_after_step=update_after_step + 1,
        use_ema_warmup=True,
        inv_gamma=inv_gamma,
        power=power,
        foreach=True,  # all weights at once: one by one, a GPU waits for the next to be launched
    )
