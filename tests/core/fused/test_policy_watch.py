from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bacinfer.core.engines.fused.policy_watch import NUM_PARTS, PolicyWatch
from bacinfer.core.engines.loops import ConditionalSample
from core.fused.fused_helpers import make_scheduler


class Policy:
    """As much of a policy as is watched."""

    def __init__(self) -> None:
        linear = nn.Linear(40, 50), nn.Linear(4, 1)
        self.model: Any = nn.ModuleDict({"first": linear[0], "second": nn.Sequential(nn.BatchNorm1d(4), linear[1])})
        self.noise_scheduler: Any = make_scheduler()

    def conditional_sample(self) -> None: ...


def calls_until_noticed(watch: PolicyWatch) -> int:
    return next(calls for calls in range(1, 1000) if not watch.unchanged())


def test_use_is_no_change() -> None:
    policy = Policy()
    watch = PolicyWatch(ConditionalSample(policy))
    for steps in range(1, 2 * NUM_PARTS):
        policy.model["first"](torch.zeros(1, 40))
        policy.noise_scheduler.set_timesteps(1 + steps % 10)
        assert watch.unchanged()


def test_another_model_or_scheduler_is_a_change() -> None:
    for name in ("model", "noise_scheduler"):
        policy = Policy()
        watch = PolicyWatch(ConditionalSample(policy))
        setattr(policy, name, getattr(Policy(), name))
        assert not watch.unchanged()


@pytest.mark.parametrize("index", [0, 1, 777, 1998, 1999])
def test_a_write_without_a_trace_is_found_in_time(index: int) -> None:
    policy = Policy()
    watch = PolicyWatch(ConditionalSample(policy))
    policy.model["first"].weight.detach().numpy().flat[index] += 1
    assert calls_until_noticed(watch) <= NUM_PARTS


@pytest.mark.parametrize("index", [0, 45_000, 89_999])
def test_a_write_without_a_trace_is_found_in_a_part_that_is_compared_where_it_lies(index: int) -> None:
    policy = Policy()
    policy.model["large"] = nn.Linear(300, 300)
    watch = PolicyWatch(ConditionalSample(policy))
    assert any(len(views) == 1 and views[0].nbytes > 4096 for part in watch._parts for views in part)
    assert all(watch.unchanged() for _ in range(NUM_PARTS))
    policy.model["large"].weight.detach().numpy().flat[index] += 1
    assert calls_until_noticed(watch) <= NUM_PARTS


def test_every_byte_is_in_one_part() -> None:
    policy = Policy()
    watch = PolicyWatch(ConditionalSample(policy))
    policy.model["transposed"] = nn.Linear(3, 3)
    policy.model["transposed"].weight = nn.Parameter(torch.rand(30, 7).t())
    watch = PolicyWatch(ConditionalSample(policy))
    tensors = [*policy.model.parameters(), *policy.model.buffers()]
    assert watch.num_bytes == sum(tensor.nbytes for tensor in tensors)
    parts = [bits for part in watch._parts for views in part for bits in views]
    assert sum(bits.nbytes for bits in parts) == watch.num_bytes
    assert len(watch._parts) <= NUM_PARTS


def test_weights_that_are_no_numbers_are_no_change() -> None:
    policy = Policy()
    policy.model["first"].weight.data.fill_(torch.nan)
    watch = PolicyWatch(ConditionalSample(policy))
    assert all(watch.unchanged() for _ in range(NUM_PARTS))


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        policy = Policy()
    watch = PolicyWatch(ConditionalSample(policy))
    assert watch.unchanged()
    with torch.inference_mode():
        policy.model["first"].weight.mul_(2)
    assert not watch.unchanged()
