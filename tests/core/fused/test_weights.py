from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bacinfer.core.engines.fused.weights import WeightWatch


def make_model() -> Any:
    return nn.ModuleDict({"first": nn.Linear(3, 4), "second": nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))})


def add_module(model: Any) -> None:
    model["third"] = nn.Linear(1, 1)


def swap_modules(model: Any) -> None:
    model["second"][1] = nn.Linear(4, 1)


@torch.no_grad()
def write_in_place(model: Any) -> None:
    model["first"].weight[0, 0] = 7


def write_buffer(model: Any) -> None:
    model["second"][0].running_mean.add_(1)


@pytest.mark.parametrize(
    "change",
    [
        *(add_module, swap_modules, write_in_place, write_buffer),
        lambda model: model.double(),
        lambda model: model.load_state_dict(make_model().state_dict()),
        lambda model: model["first"].weight.data.add_(1),
        lambda model: setattr(model["first"], "bias", None),
        lambda model: setattr(model["first"], "weight", nn.Parameter(model["first"].weight.detach().clone())),
    ],
)
def test_changes_are_noticed(change: Any) -> None:
    model = make_model().eval()
    watch = WeightWatch(model)
    model["first"](torch.zeros(1, 3))  # using it is no change
    assert watch.unchanged(model)
    change(model)
    assert not watch.unchanged(model)


def test_another_model_is_a_change() -> None:
    model = make_model()
    assert not WeightWatch(model).unchanged(make_model())


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = make_model()
    watch = WeightWatch(model)
    assert watch.unchanged(model)
    with torch.inference_mode():
        model["first"].weight.mul_(2)
    assert not watch.unchanged(model)
