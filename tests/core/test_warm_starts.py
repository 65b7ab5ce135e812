"""Plans with a warm start: calls that start from the last one's actions."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bacinfer
from bacinfer import CacheSchedule, Sampler, SamplingPlan, WarmStart
from bacinfer.core.blocks import find_blocks
from bacinfer.core.calls import CallStream
from bacinfer.core.warm_start import evenly_spaced
from core.defined_steps import DefinedSteps
from core.fused.fused_helpers import make_policy, make_scheduler
from helpers import TinyPolicy

T = 10  # training timesteps
COLD = Sampler("ddim", 5)
WARM = WarmStart(Sampler("ddim", (4, 2, 0)))
ENGINES = ("eager", "fused")


def seen(seed: int, batch: int = 2) -> dict[str, Tensor]:
    """What a policy sees at one call of an episode."""
    generator = torch.Generator().manual_seed(seed)
    return {"obs": 100 + 300 * torch.rand(batch, 2, 20, generator=generator)}


def warm_policy(engine: str = "eager", warm_start: WarmStart = WARM, **parts: Any) -> Any:
    plan = SamplingPlan(**{"sampler": COLD, "warm_start": warm_start, **parts})
    return bacinfer.apply(make_policy(), plan, engine=engine, stateful=True)


def call(policy: Any, seed: int, batch: int = 2) -> Tensor:
    """The normalised trajectory of a call, with the noise of its seed."""
    torch.manual_seed(seed)
    with torch.no_grad():
        return policy.predict_action(seen(seed, batch))["action_pred"]


class ByDefinition:
    """The same from the definitions of samplers, and a warm start's own.

    Blocks that a cache reuses are replaced by what they put out last, through hooks on the modules that end them.
    """

    def __init__(self, plan: SamplingPlan) -> None:
        self.policy = make_policy()
        self.plan = plan
        self.last: Tensor | None = None
        self.alphas = make_scheduler(num_train_timesteps=T).alphas_cumprod

    def call(self, seed: int, batch: int = 2) -> Tensor:
        torch.manual_seed(seed)
        warm, policy = self.plan.warm_start, self.policy
        assert warm is not None
        condition = policy.normalizer["obs"].normalize(seen(seed, batch)["obs"])
        executed = policy.n_action_steps
        if self.last is None or len(self.last) != batch:
            x = self.denoise(torch.randn(batch, policy.horizon, 2), condition, self.plan.sampler, self.plan.cache)
        else:
            velocity = (self.last[:, -1] - self.last[:, -5]) / 4
            tail = [self.last[:, -1] + 0.7 * k * velocity for k in range(1, executed + 1)]
            start = torch.cat([self.last[:, executed:], torch.stack(tail, dim=1)], dim=1)
            alpha = self.alphas[(warm.sampler.timesteps or ())[0]]
            noisy = alpha.sqrt() * start + (1 - alpha).sqrt() * torch.randn(batch, policy.horizon, 2)
            x = self.denoise(noisy, condition, warm.sampler, warm.cache)
            if warm.max_disagreement is not None:
                planned = policy.horizon - executed
                moved = (x - start)[:, :planned].square().mean(dim=(1, 2)).sqrt() > warm.max_disagreement
                if moved.any():
                    noise = torch.randn(batch, policy.horizon, 2)
                    cold = self.denoise(noise, condition, self.plan.sampler, self.plan.cache)
                    x = torch.where(moved[:, None, None], cold, x)
        self.last = x
        return policy.normalizer["action"].unnormalize(x)

    @torch.no_grad()
    def denoise(self, x: Tensor, condition: Tensor, sampler: Sampler | None, cache: CacheSchedule | None) -> Tensor:
        assert sampler is not None
        timesteps = sampler.timesteps or tuple(range(0, T, T // sampler.num_steps))[::-1]
        stored: dict[str, Tensor] = {}
        steps = DefinedSteps(sampler, lambda t: self.alphas[t].double())
        for k, (t, following) in enumerate(zip(timesteps, (*timesteps[1:], -1), strict=True)):
            x = steps.next_sample(x, self.model(x, t, condition, k, cache, stored), t, following)
        return x

    def model(
        self, x: Tensor, t: int, condition: Tensor, k: int, cache: CacheSchedule | None, stored: dict[str, Tensor]
    ) -> Tensor:
        hooks = []
        for block in find_blocks(self.policy.model):
            module = block.layer.get_submodule(
                {"sa": "dropout1", "mha": "dropout2", "ff": "dropout3"}[_kind(block.key)]
            )
            reused = cache is not None and not cache.update_mask(block.key)[k]

            def hook(_: Any, __: Any, output: Tensor, key: str = block.key, reused: bool = reused) -> Tensor:
                if not reused:
                    stored[key] = output
                return stored[key]

            hooks.append(module.register_forward_hook(hook))
        try:
            return self.policy.model(x, torch.tensor(t), condition)
        finally:
            for handle in hooks:
                handle.remove()


def _kind(key: str) -> str:
    return next(kind for kind in ("sa", "mha", "ff") if f"_{kind}_block" in key)


# -- equal to the definition ------------------------------------------------------------------------------------------


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("engine", ENGINES)
def test_calls_of_an_episode(engine: str) -> None:
    policy, reference = warm_policy(engine), ByDefinition(SamplingPlan(sampler=COLD, warm_start=WARM))
    for seed in range(4):
        close(call(policy, seed), reference.call(seed))
    policy.reset()
    reference.last = None
    close(call(policy, 7), reference.call(7))
    close(call(policy, 8), reference.call(8))
    for seed, batch in ((9, 3), (10, 3), (11, 2), (12, 2)):  # another batch is another episode
        close(call(policy, seed, batch), reference.call(seed, batch))


@st.composite
def plans(draw: st.DrawFn) -> SamplingPlan:
    def sampler(timesteps: tuple[int, ...]) -> Sampler:
        return Sampler(draw(st.sampled_from(["ddim", "dpm"])), timesteps, draw(st.sampled_from([0.0, 0.5, 1.0])))

    def cache(num_steps: int) -> CacheSchedule | None:
        if draw(st.booleans()):
            return None
        keys = [block.key for block in find_blocks(make_policy().model)]
        later = st.sets(st.integers(1, num_steps - 1)) if num_steps > 1 else st.just(set())
        return CacheSchedule(num_steps, {key: (0, *sorted(draw(later))) for key in keys})

    cold, warm = (
        sampler(tuple(sorted(draw(st.sets(st.integers(0, T - 1), min_size=1, max_size=5)), reverse=True)))
        for _ in range(2)
    )
    distance = draw(st.sampled_from([None, 0.05, 0.4, 100.0]))
    warm_start = WarmStart(warm, cache(warm.num_steps), distance)
    return SamplingPlan(cache(cold.num_steps), cold, warm_start)


@given(plan=plans(), events=st.lists(st.sampled_from(["call", "call", "reset", "other batch"]), max_size=6))
@settings(max_examples=15, deadline=None)
def test_random_plans_and_episodes(plan: SamplingPlan, events: list[str]) -> None:
    reference = ByDefinition(plan)
    policies = [bacinfer.apply(make_policy(), plan, engine=engine, stateful=True) for engine in ENGINES]
    batch = 2
    for seed, event in enumerate(["call", *events]):
        if event == "reset":
            reference.last = None
            for policy in policies:
                policy.reset()
            continue
        batch = 5 - batch if event == "other batch" else batch
        expected = reference.call(seed, batch)
        eager, fused = (call(policy, seed, batch) for policy in policies)
        close(eager, expected)
        close(fused, expected)
        for policy in policies:  # so that rounding does not grow from call to call, nor decide between cold and warm
            vars(policy)["_bacinfer"].warm_loop.memory.trajectory = reference.last


# -- state ------------------------------------------------------------------------------------------------------------


def is_cold(policy: Any, seed: int = 5) -> bool:
    """Whether the next call is the first one of an episode."""
    return torch.equal(call(policy, seed), call(warm_policy(), seed))


def test_state_has_to_be_asked_for() -> None:
    with pytest.raises(ValueError, match=r"one stream of calls .* pass stateful=True"):
        bacinfer.apply(make_policy(), SamplingPlan(warm_start=WARM))


def test_a_call_that_fails_is_forgotten() -> None:
    policy = warm_policy()
    call(policy, 0)
    hook = policy.model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(policy, 1)
    hook.remove()
    assert is_cold(policy)


def test_what_is_no_number_is_forgotten() -> None:
    policy = warm_policy("fused")
    call(policy, 0)
    with torch.no_grad():
        found = policy.predict_action({"obs": torch.full((2, 2, 20), torch.nan)})["action_pred"]
    assert found.isnan().all()
    assert call(policy, 5).isfinite().all()


def test_calls_with_and_without_gradients_may_follow_each_other() -> None:
    policy = warm_policy()
    with torch.inference_mode():
        policy.predict_action(seen(0))
    assert policy.predict_action(seen(1))["action"].requires_grad
    assert not is_cold(policy)


def test_streams_that_take_turns_share_nothing() -> None:
    policy = warm_policy()
    streams = [CallStream(policy, seed) for seed in range(2)]
    alone = []
    for stream in [CallStream(policy, seed) for seed in range(2)]:
        for seed in range(3):
            with stream, torch.no_grad():
                alone.append(policy.predict_action(seen(seed))["action_pred"])
    together: list[list[Tensor]] = [[], []]
    for seed in range(3):
        for number, stream in enumerate(streams):
            with stream, torch.no_grad():
                together[number].append(policy.predict_action(seen(seed))["action_pred"])
    assert all(map(torch.equal, alone, [*together[0], *together[1]]))
    assert is_cold(policy)


def test_copies_start_cold() -> None:
    policy = warm_policy()
    call(policy, 0)
    for duplicate in (copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))):
        assert is_cold(duplicate(policy))
    assert not is_cold(policy)


@pytest.mark.parametrize("engine", ENGINES)
def test_removal_restores_the_policy(engine: str) -> None:
    policy = make_policy()
    attributes, plain = dict(vars(policy)), call(policy, 3)
    bacinfer.apply(policy, SamplingPlan(sampler=COLD, warm_start=WARM), engine=engine, stateful=True)
    call(policy, 0), call(policy, 1)
    bacinfer.remove(policy)
    assert dict(vars(policy)) == attributes
    assert torch.equal(call(policy, 3), plain)


def test_the_loop_called_by_hand_neither_starts_warm_nor_is_remembered() -> None:
    policy = warm_policy()
    arguments = torch.zeros(2, policy.horizon, 2), torch.zeros(2, policy.horizon, 2, dtype=torch.bool)
    with torch.no_grad():
        policy.conditional_sample(*arguments, cond=torch.zeros(2, 2, 20))
    assert is_cold(policy)


def test_a_summary_tells_of_the_calls_that_follow() -> None:
    policy = warm_policy("fused")
    call(policy, 0), call(policy, 1)
    summary = bacinfer.summary(policy)
    assert (summary.engine, summary.num_inference_steps, summary.warm_start) == ("fused", 3, WARM)
    assert summary.flops_fraction == pytest.approx(3 / T)
    assert "warm start ddim:4-2-0" in str(summary)


# -- what cannot be ---------------------------------------------------------------------------------------------------


def test_policies_without_what_a_warm_start_needs() -> None:
    plan = SamplingPlan(warm_start=WARM)
    with pytest.raises(ValueError, match="TinyPolicy has another one"):
        bacinfer.apply(TinyPolicy(), plan, stateful=True)
    policy = make_policy()
    with pytest.raises(ValueError, match="a handle names neither"):
        bacinfer.apply(bacinfer.PolicyHandle(policy.model, T, (policy, "predict_action")), plan)

    class Own(type(make_policy())):  # type: ignore[misc]
        def conditional_sample(self, *args: Any, **kwargs: Any) -> Tensor:
            return 2 * super().conditional_sample(*args, **kwargs)

    policy = make_policy()
    policy.__class__ = Own
    with pytest.raises(ValueError, match="Own has another one"):
        bacinfer.apply(policy, plan, stateful=True)
    policy = make_policy()
    del policy.n_action_steps
    with pytest.raises(ValueError, match="no n_action_steps: give the warm start num_executed"):
        bacinfer.apply(policy, plan, stateful=True)
    assert bacinfer.summary(policy).mode == "original"


def test_nothing_is_left_of_a_trajectory_that_is_executed_whole() -> None:
    policy = warm_policy(warm_start=WarmStart(WARM.sampler, num_executed=make_policy().horizon))
    call(policy, 0)
    with pytest.raises(RuntimeError, match="steps are executed; use a plan without a warm start"):
        call(policy, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampler": Sampler("ddim", 3)}, "needs timesteps"),
        ({"cache": CacheSchedule(4, {})}, "for 4 denoising steps, its sampler has 3"),
        ({"max_disagreement": 0.0}, "above 0"),
        ({"max_disagreement": float("nan")}, "above 0"),
        ({"num_executed": 0}, "at least 1"),
    ],
)
def test_what_is_no_warm_start(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WarmStart(**{"sampler": WARM.sampler, **arguments})


def test_evenly_spaced_timesteps() -> None:
    assert evenly_spaced(40, 3) == (40, 20, 0)
    assert evenly_spaced(5, 1) == (5,)
    assert evenly_spaced(2, 3) == (2, 1, 0)
    with pytest.raises(ValueError, match="no 4 timesteps from 2 to 0"):
        evenly_spaced(2, 4)
