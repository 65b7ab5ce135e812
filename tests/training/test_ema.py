from __future__ import annotations

import pytest
import torch
from torch import nn

from bacinfer.training.ema import EMAModel


def test_the_decay_warms_up() -> None:
    ema = EMAModel(nn.Linear(1, 1), inv_gamma=1.0, power=0.75, max_value=0.999)
    assert [ema.decay(step) for step in (0, 1)] == [0.0, 0.0]
    assert ema.decay(2) == pytest.approx(1 - 2**-0.75)
    assert ema.decay(1000) == pytest.approx(1 - 1000**-0.75)
    assert ema.decay(10**6) == 0.999
    late = EMAModel(nn.Linear(1, 1), update_after_step=100, min_value=0.5)
    assert [late.decay(step) for step in (100, 101)] == [0.0, 0.0]
    assert late.decay(102) == 0.5


def test_the_average_by_hand() -> None:
    model, average = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    ema = EMAModel(average, power=1.0)  # decay n / (n + 1): the plain mean from step 1 on
    values = [5.0, 1.0, 2.0, 6.0]
    for step, value in enumerate(values):
        nn.init.constant_(model.weight, value)
        ema.update(model, step)
    assert average.weight.item() == pytest.approx((1 + 2 + 6) / 3)


def test_frozen_parameters_are_copied_and_the_average_is_not_trained() -> None:
    model, average = nn.Linear(2, 2), nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    ema = EMAModel(average)
    for step in range(5):
        nn.init.constant_(model.bias, float(step))
        ema.update(model, step)
    assert average.bias.tolist() == [4.0, 4.0]
    assert not average.training
    assert not any(parameter.requires_grad for parameter in average.parameters())
    torch.testing.assert_close(average.weight, model.weight, rtol=1e-6, atol=0)
