"""Derivatives of the actions against finite differences, and plans made of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bacinfer
from bacinfer import CacheSchedule, PolicyHandle, Sampler
from bacinfer.analysis import find_plan
from bacinfer.analysis.sensitivity import Linearisation, holding_costs, linearise, segment_costs
from bacinfer.analysis.similarity import Array
from bacinfer.analysis.update_budget import Curve, spend
from bacinfer.core.blocks import Block, find_blocks
from bacinfer.core.calls import seeded_noise
from bacinfer.core.engines import sampled_by
from bacinfer.core.engines.base import Phase
from bacinfer.core.engines.eager import EagerEngine
from bacinfer.core.engines.observing import observe_residuals
from core.fused.fused_helpers import make_policy
from helpers import TinyPolicy, act, encoder_model, observation
from tiny_policies import observations

SEED = 5


class CalmPolicy(TinyPolicy):
    """One whose residuals change little from step to step."""

    def predict_action(self, obs_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        x = torch.randn(len(obs_dict["obs"]), 4, 16, dtype=obs_dict["obs"].dtype)
        for _ in range(self.num_inference_steps):
            x = x - 3e-4 * self.model(x, torch.tensor(0), obs_dict["obs"])
        return {"action_pred": x}


def perturbed(policy: Any, obs: Any, key: str, step: int, change: Tensor) -> Tensor:
    """The normalised actions where a block's residual at a step is another one."""
    calls = iter(range(1000))

    def residual(layer: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plain = changed.spec.residual(layer, x, *args, **kwargs)
        return plain + change if next(calls) == step else plain

    blocks = find_blocks(policy.model)
    (changed,) = [block for block in blocks if block.key == key]
    others: list[Block] = [
        replace(block, spec=replace(block.spec, residual=residual)) if block.key == key else block for block in blocks
    ]
    with torch.no_grad(), seeded_noise(policy, SEED), observe_residuals(policy, lambda *_: None, others):
        result = policy.predict_action(obs)["action_pred"]
        return policy.normalizer["action"].normalize(result) if hasattr(policy, "normalizer") else result


@pytest.mark.parametrize("kind", ["decoder", "encoder", "own steps", "deterministic steps"])
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    sampler = None
    if kind in ("decoder", "encoder"):
        policy: Any = TinyPolicy(encoder_model() if kind == "encoder" else None).double()
        obs = observation(2, dtype=torch.float64)
    else:
        policy = make_policy().double()
        obs = {name: tensor.double() for name, tensor in observations(2).items()}
        sampler = Sampler("own", 5) if kind == "own steps" else Sampler("ddim", 5)
    generator = torch.Generator().manual_seed(1)
    with sampled_by(policy, sampler):
        found = linearise(policy, obs, SEED, num_probes=2)
        for key, residuals in list(found.residuals.items())[::2]:
            for step in {0, 2, len(residuals) - 1}:
                change = 1e-5 * torch.randn(residuals[step].shape, dtype=torch.float64, generator=generator)
                difference = perturbed(policy, obs, key, step, change) - perturbed(policy, obs, key, step, -change)
                expected = (found.probes * difference / 2).flatten(1).sum(dim=1)
                got = (found.gradients[key][:, step] * change).flatten(1).sum(dim=1)
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize(
    "key", ["decoder.layers.0_sa_block", "decoder.layers.1_mha_block", "decoder.layers.2_ff_block"]
)
def test_the_change_of_a_held_residual_is_that_of_the_action_where_it_is_small(key: str) -> None:
    policy, obs, a, e = CalmPolicy().double(), observation(2, dtype=torch.float64), 3, 8
    found = linearise(policy, obs, SEED, num_probes=3)
    plain = act(policy, obs, SEED)
    keys = [block.key for block in find_blocks(policy.model)]
    steps = dict.fromkeys(keys, tuple(range(10))) | {key: tuple(t for t in range(10) if not a < t < e)}
    bacinfer.apply(policy, CacheSchedule(10, steps), engine="eager")
    changes = (found.probes * (act(policy, obs, SEED) - plain)).flatten(1).sum(dim=1)
    torch.testing.assert_close(changes, _first_order(found, key, a, e), rtol=0.02, atol=0)
    costs = segment_costs(found)[key]
    assert costs[a, e] == pytest.approx(float(changes.square().mean()) / plain.numel(), rel=0.05)


def _first_order(found: Linearisation, key: str, a: int, e: int) -> Tensor:
    """The change of each probe's product with the actions, by the definition."""
    residuals, gradients = found.residuals[key], found.gradients[key]
    return sum((gradients[:, t] * (residuals[a] - residuals[t])).flatten(1).sum(dim=1) for t in range(a, e))  # type: ignore[return-value]


def test_with_a_schedule_it_is_the_cached_trajectory_that_is_differentiated() -> None:
    policy, obs = TinyPolicy().double(), observation(2, dtype=torch.float64)
    blocks = find_blocks(policy.model)
    schedule = CacheSchedule.periodic([block.key for block in blocks], 10, 4)
    found = linearise(policy, obs, SEED, num_probes=2, schedule=schedule)
    change = 1e-5 * torch.randn(2, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def cached(key: str = "", at: int = -1, times: float = 0.0) -> Tensor:
        """The actions of the cached policy, where what a block adds at a step is changed."""

        def merged(block: Block) -> Any:
            steps = iter(range(10))

            def merge(layer: Any, x: Tensor, residual: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                is_changed = next(steps) == at and block.key == key
                return block.spec.merge(
                    layer, x, residual + times * change if is_changed else residual, *args, **kwargs
                )

            return merge

        others = [replace(block, spec=replace(block.spec, merge=merged(block))) for block in blocks]
        engine = EagerEngine(policy, others, [Phase(schedule)])
        engine.attach()
        try:
            return act(policy, obs, SEED)
        finally:
            engine.detach()

    for key in ("decoder.layers.0_sa_block", "decoder.layers.1_mha_block", "decoder.layers.2_ff_block"):
        for step in (0, 2, 9):  # computed, reused, reused
            expected = (found.probes * (cached(key, step, 1) - cached(key, step, -1)) / 2).flatten(1).sum(dim=1)
            got = (found.gradients[key][:, step] * change).flatten(1).sum(dim=1)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-10)
    plain = linearise(policy, obs, SEED, num_probes=2)
    for key, residuals in found.residuals.items():
        torch.testing.assert_close(residuals[0], plain.residuals[key][0])
        assert not torch.equal(residuals[3], residuals[0])  # computed, though another one is used


def test_costs_by_their_definition() -> None:
    found = linearise(TinyPolicy(), observation(2), SEED, num_probes=3)
    for key, costs in segment_costs(found).items():
        for a in range(10):
            assert costs[a, a + 1] == pytest.approx(0, abs=1e-12)
            assert np.isinf(costs[a, : a + 1]).all()
            for e in range(a + 2, 11):
                expected = _first_order(found, key, a, e).square().mean() / found.probes[0].numel()
                assert costs[a, e] == pytest.approx(float(expected), rel=1e-3, abs=1e-10)


def test_blocks_are_computed_again_instead_of_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, calls = TinyPolicy(), []
    plain = nn.TransformerDecoderLayer._ff_block

    def counted(layer: Any, x: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return plain(layer, x)

    monkeypatch.setattr(nn.TransformerDecoderLayer, "_ff_block", counted)
    linearise(policy, observation(1), SEED, num_probes=2)
    assert len(calls) >= 2 * 10 * 3


# -- plans -------------------------------------------------------------------------------------------------------


def evaluations(policy: Any, schedule: CacheSchedule) -> float:
    weights = {block.key: block.num_weights for block in find_blocks(policy.model)}
    return sum(weights[key] * len(steps) for key, steps in schedule.update_steps.items()) / sum(weights.values())


@pytest.mark.parametrize("sampler", [None, Sampler("own", 6), Sampler("ddim", 6)])
@pytest.mark.parametrize("budget", [1, 2.5, 4])
def test_a_plan_keeps_its_budget_and_runs_in_every_engine(sampler: Sampler | None, budget: float) -> None:
    policy, seen = make_policy(), [observations(1)]
    plan = bacinfer.find_sensitive_plan(policy, seen, budget, sampler=sampler)
    assert plan.cache is not None
    assert plan.sampler == sampler
    assert budget - 1 < evaluations(policy, plan.cache) <= budget + 1e-6
    eager = _actions(bacinfer.apply(policy, plan, engine="eager"))
    assert bacinfer.summary(policy).schedule == plan.cache
    torch.testing.assert_close(_actions(bacinfer.apply(policy, plan, engine="fused")), eager, rtol=1e-3, atol=1e-2)


def _actions(policy: Any) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return policy.predict_action(observations(2))["action_pred"]


def test_blocks_get_different_numbers_of_updates_and_less_error_than_equal_ones() -> None:
    policy = CalmPolicy()
    schedule = bacinfer.find_sensitive_plan(policy, [observation(1)], 3).cache
    assert schedule is not None
    assert len({len(steps) for steps in schedule.update_steps.values()}) > 1
    plain = act(policy, observation(1))
    uniform = CacheSchedule.periodic(schedule.update_steps, 10, 4)

    def error(cached: CacheSchedule) -> float:
        return float((act(bacinfer.apply(policy, cached, engine="eager"), observation(1)) - plain).square().mean())

    assert error(schedule) < error(uniform)


def test_later_rounds_differentiate_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, seen, budget = TinyPolicy(), [observation(1), observation(2)], 3
    along: list[CacheSchedule | None] = []  # the trajectories that were differentiated
    costs: list[dict[str, Array]] = []

    def watched(policy: Any, observations: Any, noise_seed: int, schedule: CacheSchedule | None) -> dict[str, Array]:
        along.append(schedule)
        costs.append(holding_costs(policy, observations, noise_seed, schedule))
        return costs[-1]

    monkeypatch.setattr(find_plan, "holding_costs", watched)
    found = bacinfer.find_sensitive_plan(policy, seen, budget).cache
    blocks = find_blocks(policy.model)
    total = sum(block.num_weights for block in blocks)
    shares = {block.key: block.num_weights / total for block in blocks}
    expected: list[CacheSchedule | None] = [None]
    for number in range(1, len(costs) + 1):
        means = {key: np.mean([of_round[key] for of_round in costs[:number]], axis=0) for key in shares}
        steps = spend({key: Curve.of(mean) for key, mean in means.items()}, shares, budget)
        expected.append(CacheSchedule(10, steps, "sensitivity-weighted, 3 evaluations"))
    assert along == expected[:-1]
    assert found == expected[-1]
    assert len(set(expected)) >= 3  # not the first one again
    assert len(costs) == find_plan.MAX_ROUNDS or expected[-1] == expected[-2]

    calm = bacinfer.find_sensitive_plan(CalmPolicy(), seen, 10).cache
    assert along[-1] == calm  # differentiated, and nothing changed


def test_with_the_budget_of_all_steps_nothing_changes() -> None:
    policy = TinyPolicy()
    plain = act(policy)
    bacinfer.apply(policy, bacinfer.find_sensitive_plan(policy, [observation(1)], 10), engine="eager")
    torch.testing.assert_close(act(policy), plain, rtol=1e-5, atol=1e-5)


def test_the_policy_its_plan_and_the_process_are_left_as_found() -> None:
    policy = TinyPolicy(num_inference_steps=4)
    expected = bacinfer.find_sensitive_plan(policy, [observation(1)], 2)
    bacinfer.apply(policy, CacheSchedule.periodic(expected.cache.update_steps, 4, 3), engine="eager")  # type: ignore[union-attr]
    cached, attributes, state = act(policy), dict(vars(policy)), torch.get_rng_state()
    with torch.no_grad():
        assert bacinfer.find_sensitive_plan(policy, [observation(1)], 2) == expected
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(vars(policy)) == attributes
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert torch.equal(act(policy), cached)


def test_frozen_weights_and_handles_have_the_same_plan() -> None:
    policy = TinyPolicy(num_inference_steps=4)
    expected = bacinfer.find_sensitive_plan(policy, [observation(1)], 2)
    handle = PolicyHandle(policy.model, 4, (policy, "predict_action"))
    assert bacinfer.find_sensitive_plan(handle, [observation(1)], 2) == expected
    assert bacinfer.find_sensitive_plan(policy.requires_grad_(False), [observation(1)], 2) == expected


class NoGradPolicy(TinyPolicy):
    @torch.no_grad()
    def predict_action(self, obs_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        return super().predict_action(obs_dict)


class DetachingPolicy(TinyPolicy):
    def predict_action(self, obs_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        x = torch.randn(1, 4, 16)
        for k in range(self.num_inference_steps):
            x = x.detach() - 0.1 * self.model(x.detach(), torch.tensor(k), obs_dict["obs"])
        return {"action_pred": x}


@pytest.mark.parametrize("policy_class", [NoGradPolicy, DetachingPolicy])
def test_a_loop_without_gradients_is_refused(policy_class: type[TinyPolicy]) -> None:
    policy = policy_class()
    with pytest.raises(ValueError, match="cannot be differentiated: no gradient goes from its actions"):
        bacinfer.find_sensitive_plan(policy, [observation(1)], 3)
    bacinfer.apply(policy, bacinfer.find_plan(policy, [observation(1)], 3, 1))


@pytest.mark.parametrize("budget", [0, 0.99, 10.5, float("nan"), True, "3", None])
def test_impossible_budgets(policy: TinyPolicy, budget: Any) -> None:
    def nothing_runs() -> Iterator[Any]:
        pytest.fail("observed before the budget was looked at")
        yield

    with pytest.raises(ValueError, match=r"budget must be a number in 1\.\.10 .*got"):
        bacinfer.find_sensitive_plan(policy, nothing_runs(), budget)


def test_other_impossible_requests(policy: TinyPolicy) -> None:
    with pytest.raises(ValueError, match="no observations"):
        bacinfer.find_sensitive_plan(policy, [], 3)
    broken = observation(1)
    broken["obs"][0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        bacinfer.find_sensitive_plan(policy, [broken], 3)
    bacinfer.apply(policy, bacinfer.SamplingPlan())
    blocks = find_blocks(policy.model)
    with (
        pytest.raises(RuntimeError, match="a plan is applied to this policy"),
        observe_residuals(policy, lambda *_: None, blocks),
    ):
        pass


def test_blocks_whose_cost_is_not_known_are_refused() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.linear(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = Branch()

        def forward(self, x: Tensor, timestep: Tensor, cond: Tensor) -> Tensor:
            return self.branch(x)

    spec = bacinfer.ResidualBlock("ff_block", "linear", residual=lambda layer, x: layer.linear(x))
    bacinfer.register_layer(Branch, [spec])
    with pytest.raises(ValueError, match=r"\['branch_ff_block'\] cost is not known, as they name no weights"):
        bacinfer.find_sensitive_plan(TinyPolicy(Model()), [observation(1)], 3)
