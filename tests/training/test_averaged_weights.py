"""The average of the weights is Diffusion Policy's: diffusers' class with another count of the steps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bacinfer.training.averaged_weights import make_ema

SETTINGS = {"update_after_step": 0, "inv_gamma": 1.0, "power": 0.75, "min_value": 0.0, "max_value": 0.9999}


def published_decay(step: int, update_after_step: int, power: float, min_value: float, max_value: float) -> float:
    """Diffusion Policy's decay at a step counted from 0."""
    warm = step - update_after_step - 1
    return max(min_value, min(1 - (1 + warm) ** -power, max_value)) if warm > 0 else 0.0


@pytest.mark.parametrize("changed", [{}, {"update_after_step": 100, "min_value": 0.5}, {"max_value": 0.9}])
def test_the_decay_at_every_step(changed: dict[str, float]) -> None:
    settings = SETTINGS | changed
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    ema = make_ema(model.parameters(), **settings)
    expected = 0.0
    for step in range(400):
        nn.init.constant_(model.weight, float(step % 7))
        ema.step(model.parameters())
        decay = published_decay(step, **{name: settings[name] for name in settings if name != "inv_gamma"})
        expected = decay * expected + (1 - decay) * (step % 7)
        assert ema.shadow_params[0].item() == pytest.approx(expected, rel=1e-12)


def test_the_decay_far_on() -> None:
    ema = make_ema(nn.Linear(1, 1).parameters(), **SETTINGS)
    assert ema.get_decay(1001) == pytest.approx(1 - 1000**-0.75)
    assert ema.get_decay(10**6) == 0.9999


def test_frozen_parameters_are_copied_and_the_average_is_not_trained() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    average = copy.deepcopy(model)
    ema = make_ema(average.parameters(), **SETTINGS)
    for step in range(5):
        nn.init.constant_(model.bias, float(step))
        ema.step(model.parameters())
    ema.copy_to(average.parameters())
    assert average.bias.tolist() == [4.0, 4.0]
    assert not any(parameter.requires_grad for parameter in ema.shadow_params)
    torch.testing.assert_close(average.weight, model.weight, rtol=1e-6, atol=0)
