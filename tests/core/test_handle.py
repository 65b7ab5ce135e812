from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bacinfer
from bacinfer import CacheSchedule, FastDiffusionPolicy, PolicyHandle, SamplingPlan
from bacinfer.core.blocks import find_blocks
from bacinfer.core.engines.observing import observe_residuals
from bacinfer.core.patching import Patch
from helpers import WIDTH, TinyPolicy, act, decoder_model, observation

K = 10


class Renamed(nn.Module):
    """The tiny policy under other names; its loop may call the layers itself, as vision-language-action models do."""

    def __init__(self, calls_layers: bool) -> None:
        super().__init__()
        self.denoiser = TinyPolicy().model
        self.calls_layers = calls_layers
        self.eval()

    def plan_ahead(self, obs: dict[str, Tensor]) -> Tensor:
        condition = obs["obs"]
        x = torch.randn(len(condition), 4, WIDTH)
        mask = torch.triu(torch.full((4, 4), float("-inf")), 1)
        for k in reversed(range(K)):
            if self.calls_layers:
                y = x
                for layer in self.denoiser.decoder.layers:
                    y = layer(y, condition + self.denoiser.time_emb(torch.tensor(k)), tgt_mask=mask)
            else:
                y = self.denoiser(x, torch.tensor(k), condition)
            x = 0.9 * x - 0.2 * y + 0.05 * torch.randn_like(x)
        return x


def handle_of(policy: Renamed) -> PolicyHandle:
    steps: Any = "first block" if policy.calls_layers else "model"
    return PolicyHandle(policy.denoiser, K, (policy, "plan_ahead"), steps)


def sample(policy: Renamed, batch: int = 2) -> Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return policy.plan_ahead(observation(batch))


def schedule(interval: int) -> CacheSchedule:
    return CacheSchedule.periodic([block.key for block in find_blocks(decoder_model())], K, interval)


@pytest.mark.parametrize("calls_layers", [False, True])
def test_a_policy_with_other_names_is_cached_like_any_other(calls_layers: bool) -> None:
    policy = Renamed(calls_layers)
    plain, keys, attributes = sample(policy), list(policy.state_dict()), set(vars(policy))
    bacinfer.apply(handle_of(policy), SamplingPlan())
    assert torch.equal(sample(policy), plain)
    bacinfer.apply(handle_of(policy), schedule(3))
    assert list(policy.state_dict()) == keys
    expected = act(bacinfer.apply(TinyPolicy(), schedule(3)))
    for _ in range(2):
        torch.testing.assert_close(sample(policy), expected, rtol=0, atol=1e-6)
    assert bacinfer.summary(handle_of(policy)).mean_updates == 4
    assert torch.equal(sample(copy.deepcopy(policy)), sample(policy))
    bacinfer.remove(handle_of(policy))
    assert torch.equal(sample(policy), plain)
    assert set(vars(policy)) == attributes


@pytest.mark.parametrize("calls_layers", [False, True])
def test_every_function_takes_a_handle(calls_layers: bool, tmp_path: Path) -> None:
    policy = Renamed(calls_layers)
    handle, plain, keys = handle_of(policy), sample(policy), list(policy.state_dict())
    plan = bacinfer.find_plan(handle, [observation(1)], 3, 2)
    plan.save(tmp_path / "plan.json")
    assert bacinfer.apply(handle, tmp_path / "plan.json") is handle
    cached = sample(bacinfer.refresh(handle).owner)
    assert not torch.equal(cached, plain)
    found = bacinfer.measure(handle, {"bac": plan}, [observation(1)], num_calls=1)
    assert found.rows["bac"].flops < found.rows["plain"].flops
    assert torch.equal(sample(policy), cached)
    assert bacinfer.summary(handle).schedule == plan.cache
    assert FastDiffusionPolicy.summary(FastDiffusionPolicy.apply_cache(handle, 4)).mode == "threshold"
    assert list(policy.state_dict()) == keys
    assert FastDiffusionPolicy.remove_cache(handle) is handle
    assert torch.equal(sample(policy), plain)


class Encoding(Renamed):
    """Its loop takes what was encoded of an observation, and does the layers' work without calling the model."""

    def look(self, obs: dict[str, Tensor]) -> Tensor:
        return self.plan_ahead({"obs": 2 * obs["obs"]})

    def plan_ahead(self, obs: dict[str, Tensor]) -> Tensor:
        x = torch.randn(len(obs["obs"]), 4, WIDTH)
        for k in reversed(range(K)):
            x = 0.9 * x - 0.2 * self.denoise(x, torch.tensor(k), obs["obs"])
        return x

    def denoise(self, x: Tensor, k: Tensor, condition: Tensor) -> Tensor:
        return type(self.denoiser).forward(self.denoiser, x, k, condition)


class ThroughTheModel(Patch):
    def run(self, x: Tensor, k: Tensor, condition: Tensor) -> Tensor:
        return self.owner.denoiser(x, k, condition)


def test_a_loop_that_calls_no_model_with_what_was_encoded() -> None:
    policy = Encoding(calls_layers=False)
    handle = PolicyHandle(
        policy.denoiser,
        K,
        (policy, "plan_ahead"),
        act=policy.look,
        patches=(ThroughTheModel(policy, "denoise"),),
    )

    def look() -> Tensor:
        torch.manual_seed(1)
        with torch.no_grad():
            return policy.look(observation(2))

    plain = look()
    plan = bacinfer.find_plan(handle, [observation(1)], 3, 2)
    bacinfer.apply(handle, SamplingPlan())
    assert torch.equal(look(), plain)
    bacinfer.apply(handle, plan)
    assert not torch.equal(look(), plain)
    bacinfer.remove(handle)
    assert torch.equal(look(), plain)
    assert "denoise" not in vars(policy)


@pytest.mark.parametrize("calls_layers", [False, True])
def test_residuals_of_a_handle_are_observed(calls_layers: bool) -> None:
    policy = Renamed(calls_layers)
    seen: list[int] = []
    with observe_residuals(handle_of(policy), lambda block, step, residual: seen.append(step)):
        sample(policy)
    assert seen == [k for k in range(K) for _ in range(9)]


def test_another_number_of_steps_than_the_handle_says_is_an_error() -> None:
    policy = Renamed(calls_layers=True)
    for steps, message in ((K - 1, f"more than K = {K - 1}"), (K + 1, f"took {K} denoising steps")):
        handle = PolicyHandle(policy.denoiser, steps, (policy, "plan_ahead"), "first block")
        bacinfer.apply(handle, SamplingPlan())
        with pytest.raises(RuntimeError, match=message):
            sample(policy)
        bacinfer.remove(handle)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "m"}, TypeError, "must be a torch.nn.Module, got str"),
        ({"sample": (object(), "dream")}, TypeError, "object has no method 'dream'"),
        ({"num_inference_steps": 0}, ValueError, "an integer >= 1, got 0"),
        ({"num_inference_steps": True}, ValueError, "an integer >= 1, got True"),
        ({"num_inference_steps": 7.5}, ValueError, "an integer >= 1, got 7.5"),
        ({"steps": "layer"}, ValueError, "the 'model' or the 'first block', got 'layer'"),
    ],
)
def test_wrong_parts_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    policy = Renamed(calls_layers=False)
    right = {"model": policy.denoiser, "num_inference_steps": K, "sample": (policy, "plan_ahead")}
    with pytest.raises(error, match=message):
        PolicyHandle(**{**right, **arguments})


def test_what_is_no_policy_is_told_of_handles() -> None:
    with pytest.raises(TypeError, match=r"it has no model, num_inference_steps, predict_action.*PolicyHandle"):
        bacinfer.apply(nn.Linear(1, 1), SamplingPlan())
