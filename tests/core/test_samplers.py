"""Plans with a sampler: other denoising steps than the policy's own K."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

import bacinfer
from bacinfer import CacheSchedule, Sampler, SamplingPlan
from bacinfer.core.blocks import find_blocks
from bacinfer.core.engines.planned_scheduler import PlannedScheduler
from core.defined_steps import DefinedSteps
from core.fused.fused_helpers import act, assert_agree, make_policy, make_scheduler
from helpers import TinyPolicy
from tiny_policies import VARIANTS, observations

T = 10  # the policies' training timesteps
ENGINES = ("eager", "fused")


def planned(policy: Any, sampler: Sampler, engine: str, interval: int | None = None) -> Any:
    """A copy that is sampled so, with a cache where there is an interval."""
    keys = [block.key for block in find_blocks(policy.model)]
    cache = None if interval is None else CacheSchedule.periodic(keys, sampler.num_steps, interval)
    return bacinfer.apply(copy.deepcopy(policy), SamplingPlan(cache, sampler), engine=engine)


def levels(t: int) -> Tensor:
    """The share of signal at a timestep (Ho et al., 2020), in double precision."""
    return make_scheduler(num_train_timesteps=T).alphas_cumprod[t].double()


def by_definition(policy: Any, sampler: Sampler, timesteps: tuple[int, ...]) -> Tensor:
    """The actions of a sampler, from the papers' formulas."""
    obs = observations()
    torch.manual_seed(1)
    x = torch.randn(len(obs["obs"]), policy.horizon, 2)
    condition = policy.normalizer["obs"].normalize(obs["obs"])
    steps = DefinedSteps(sampler, levels)
    with torch.no_grad():
        for t, following in zip(timesteps, (*timesteps[1:], -1), strict=True):
            x = steps.next_sample(x, policy.model(x, torch.tensor(t), condition), t, following)
    return policy.normalizer["action"].unnormalize(x)


SAMPLERS = [
    *(Sampler("own", n) for n in (1, 3, 5, 10)),
    *(Sampler(kind, n, eta) for kind in ("ddim", "dpm") for n in (1, 2, 5) for eta in (0.0, 0.4, 1.0)),
    *(Sampler(kind, steps) for kind in ("own", "ddim", "dpm") for steps in ((9, 4, 0), (7, 6, 1), (3,))),
    Sampler("ddim", (8, 5, 2), 0.7),
]


SAMPLED = [Sampler("own", 5), Sampler("ddim", (8, 5, 4, 1), 0.6), Sampler("dpm", (8, 5, 4, 1), 0.6)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.spec)
def test_a_sampler_is_its_definition(sampler: Sampler, engine: str) -> None:
    policy = make_policy()
    timesteps = sampler.timesteps or tuple(range(0, T, T // sampler.num_steps))[: sampler.num_steps][::-1]
    expected = by_definition(policy, sampler, timesteps)
    torch.testing.assert_close(act(planned(policy, sampler, engine)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("settings", [{}, {"timestep_spacing": "trailing"}, {"prediction_type": "sample"}], ids=str)
def test_ddim_is_that_of_diffusers(engine: str, eta: float, settings: dict[str, Any]) -> None:
    policy = make_policy(scheduler=make_scheduler(num_train_timesteps=T, **settings))
    reference = copy.deepcopy(policy)
    reference.noise_scheduler = DDIMScheduler.from_config(policy.noise_scheduler.config)
    reference.num_inference_steps = 5
    reference.kwargs = {"eta": eta}
    found = act(planned(policy, Sampler("ddim", 5, eta), engine))
    torch.testing.assert_close(found, act(reference), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_steps", [1, 4, 10])
def test_fewer_own_steps_are_the_users_one_line_change(num_steps: int) -> None:
    policy = make_policy()
    by_hand = copy.deepcopy(policy)
    by_hand.num_inference_steps = num_steps
    assert torch.equal(act(planned(policy, Sampler("own", num_steps), "eager")), act(by_hand))
    assert_agree(act(planned(policy, Sampler("own", num_steps), "fused")), by_hand)
    tiny = TinyPolicy()
    by_hand = copy.deepcopy(tiny)
    by_hand.num_inference_steps = num_steps
    obs = {"obs": torch.randn(2, 2, 16, generator=torch.Generator().manual_seed(0))}
    torch.manual_seed(0)
    expected = by_hand.predict_action(obs)["action"]
    bacinfer.apply(tiny, SamplingPlan(sampler=Sampler("own", num_steps)))
    torch.manual_seed(0)
    assert torch.equal(tiny.predict_action(obs)["action"], expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sampler", SAMPLED, ids=lambda s: s.spec)
def test_engines_agree_on_caches_of_a_samplers_steps(variant: str, sampler: Sampler) -> None:
    policy = make_policy(variant)
    found = act(planned(policy, sampler, "fused", interval=2))
    assert_agree(found, planned(policy, sampler, "eager", interval=2))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("sampler", [Sampler("own", 4), Sampler("ddim", 4), Sampler("own", (9, 3))], ids=str)
def test_removal_restores_the_policy(sampler: Sampler, engine: str) -> None:
    policy = make_policy()
    attributes, plain = dict(vars(policy)), act(policy)
    bacinfer.apply(policy, SamplingPlan(sampler=sampler), engine=engine)
    assert not torch.equal(act(policy), plain)
    assert policy.num_inference_steps == sampler.num_steps
    bacinfer.apply(policy, SamplingPlan(sampler=Sampler("own", 2)), engine=engine)  # in the place of the other
    bacinfer.remove(policy)
    assert dict(vars(policy)) == attributes
    assert torch.equal(act(policy), plain)


def test_a_plan_that_does_not_fit_leaves_the_one_before() -> None:
    policy = bacinfer.apply(make_policy(), SamplingPlan(sampler=Sampler("ddim", 4)))
    before = act(policy)
    with pytest.raises(ValueError, match="trained with 10 timesteps, which own:11 exceeds"):
        bacinfer.apply(policy, SamplingPlan(sampler=Sampler("own", 11)))
    with pytest.raises(ValueError, match="which ddim:10-0 exceeds"):
        bacinfer.apply(policy, SamplingPlan(sampler=Sampler("ddim", (10, 0))))
    assert torch.equal(act(policy), before)


def test_a_change_of_the_policys_steps_is_noticed() -> None:
    policy = bacinfer.apply(make_policy(), SamplingPlan(sampler=Sampler("ddim", 4)))
    policy.num_inference_steps = 6
    with pytest.raises(RuntimeError, match="num_inference_steps is 6, but the cache was applied for K = 4"):
        act(policy)
    with pytest.raises(RuntimeError, match="num_inference_steps was set to 6 after the plan was applied"):
        bacinfer.remove(policy)
    policy.num_inference_steps = 4
    act(bacinfer.remove(policy))
    assert policy.num_inference_steps == T


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_a_change_of_the_scheduler_is_noticed(engine: str) -> None:
    policy = make_policy()
    planned_policy = planned(policy, Sampler("ddim", 4), engine)
    act(planned_policy)
    for changed in (policy, planned_policy.noise_scheduler.own):
        scheduler = getattr(changed, "noise_scheduler", changed)
        scheduler.alphas_cumprod = scheduler.alphas_cumprod * 0.9
    torch.testing.assert_close(act(planned_policy), act(planned(policy, Sampler("ddim", 4), "eager")))


def test_a_policy_without_a_diffusers_scheduler_takes_its_own_steps_only() -> None:
    policy = TinyPolicy()
    with pytest.raises(ValueError, match="ddim:4 cannot run this policy: its noise scheduler is no diffusers"):
        bacinfer.apply(policy, SamplingPlan(sampler=Sampler("ddim", 4)))
    assert bacinfer.summary(policy).mode == "original"


def handle_of(policy: Any, **settings: Any) -> bacinfer.PolicyHandle:
    return bacinfer.PolicyHandle(policy.model, policy.num_inference_steps, (policy, "predict_action"), **settings)


@pytest.mark.parametrize("interval", [None, 2])
@pytest.mark.parametrize("sampler", SAMPLED, ids=lambda s: s.spec)
def test_a_handle_says_where_steps_and_scheduler_are(sampler: Sampler, interval: int | None) -> None:
    policy = make_policy()
    handle = handle_of(policy, num_steps=(policy, "num_inference_steps"), scheduler=(policy, "noise_scheduler"))
    before = dict(vars(policy))
    expected = act(planned(policy, sampler, "eager", interval))
    keys = [block.key for block in find_blocks(policy.model)]
    cache = None if interval is None else CacheSchedule.periodic(keys, sampler.num_steps, interval)
    bacinfer.apply(handle, SamplingPlan(cache, sampler), engine="eager")
    torch.testing.assert_close(act(policy), expected)
    assert (policy.num_inference_steps, policy.noise_scheduler) == (T, before["noise_scheduler"])  # between calls
    assert bacinfer.summary(handle).num_inference_steps == sampler.num_steps
    copied = copy.deepcopy(policy)
    torch.testing.assert_close(act(copied), expected)
    bacinfer.remove(handle)
    assert vars(policy) == before


def test_a_handle_is_restored_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy()
    handle = handle_of(policy, num_steps=(policy, "num_inference_steps"))
    bacinfer.apply(handle, SamplingPlan(sampler=Sampler("own", 4)))
    monkeypatch.setattr(policy.noise_scheduler, "step", None)
    with pytest.raises(TypeError):
        act(policy)
    assert policy.num_inference_steps == T


def test_what_a_handle_does_not_name_is_refused() -> None:
    policy = make_policy()
    with pytest.raises(ValueError, match="own:4 cannot run this policy: its handle names no num_steps"):
        bacinfer.apply(handle_of(policy), SamplingPlan(sampler=Sampler("own", 4)))
    steps = {"num_steps": (policy, "num_inference_steps")}
    with pytest.raises(ValueError, match="ddim:4 cannot run this policy: its handle names no scheduler"):
        bacinfer.apply(handle_of(policy, **steps), SamplingPlan(sampler=Sampler("ddim", 4)))
    stale = handle_of(policy, **steps)
    policy.num_inference_steps = 4
    with pytest.raises(ValueError, match="has num_inference_steps = 10, but num_inference_steps is 4"):
        bacinfer.apply(stale, SamplingPlan(sampler=Sampler("own", 2)))
    assert bacinfer.summary(policy).mode == "original"


def test_a_scheduler_of_ones_own_takes_no_timesteps_by_formula() -> None:
    """What its steps are, only it knows; fewer of them are its own business."""

    class Halved(type(make_scheduler())):  # type: ignore[misc]
        def step(self, *args: Any, **kwargs: Any) -> Any:
            result = super().step(*args, **kwargs)
            result.prev_sample *= 0.5
            return result

    Halved.__name__ = "DDPMScheduler"  # as a fork of diffusers would call it
    policy = make_policy(scheduler=Halved(num_train_timesteps=T, beta_schedule="squaredcos_cap_v2"))
    with pytest.raises(ValueError, match="computes another step"):
        bacinfer.apply(policy, SamplingPlan(sampler=Sampler("own", (5, 2))))
    by_hand = copy.deepcopy(policy)
    by_hand.num_inference_steps = 3
    assert torch.equal(act(planned(policy, Sampler("own", 3), "auto")), act(by_hand))


def test_steps_that_need_the_one_before_are_taken_in_turn() -> None:
    scheduler = PlannedScheduler(make_scheduler(num_train_timesteps=T), Sampler("dpm", (8, 5, 2, 0)))
    x = torch.randn(2, 4, 3)
    for timestep in (8, 5, 2, 0):
        scheduler.step(x, timestep, x)
    for out_of_turn in ((5,), (8, 2), (8, 5, 5)):
        *before, last = out_of_turn
        scheduler.set_timesteps(4)
        for timestep in before:
            scheduler.step(x, timestep, x)
        with pytest.raises(RuntimeError, match=f"takes its steps in their order, from the first; got {last}"):
            scheduler.step(x, last, x)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("sampler", [Sampler("ddim", 4, 0.5), Sampler("dpm", 4, 0.5)], ids=lambda s: s.spec)
def test_copies_and_losses_of_a_policy_with_a_sampler(sampler: Sampler, engine: str) -> None:
    policy = planned(make_policy(), sampler, engine)
    policy.predict_action(observations())  # whose graph nothing keeps
    expected = act(policy)
    for duplicate in (copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))):
        assert torch.equal(act(duplicate(policy)), expected)
    batch = {"obs": torch.rand(2, policy.horizon, 20) * 512, "action": torch.rand(2, policy.horizon, 2)}
    torch.manual_seed(3)
    found = policy.compute_loss(batch)
    torch.manual_seed(3)
    assert torch.equal(found, bacinfer.remove(policy).compute_loss(batch))


def test_find_plan_finds_the_cache_of_a_samplers_steps() -> None:
    policy, sampler = make_policy(), Sampler("ddim", 6)
    plan = bacinfer.find_plan(policy, [observations()], num_updates=3, num_bu_blocks=1, sampler=sampler)
    assert plan.sampler == sampler
    assert plan.cache is not None
    assert plan.cache.num_inference_steps == 6
    assert policy.num_inference_steps == T
    again = bacinfer.find_plan(
        bacinfer.apply(policy, plan), [observations()], num_updates=3, num_bu_blocks=1, sampler=sampler
    )
    assert again == plan
    summary = bacinfer.summary(policy)
    assert (summary.sampler, summary.num_inference_steps) == (sampler, 6)
    assert summary.flops_fraction < 0.6
    assert "sampler ddim:6" in str(summary)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("euler", 5), "unknown sampler 'euler'"),
        (("own", 0), "at least one step"),
        (("own", ()), "descending order"),
        (("own", (3, 3)), "descending order"),
        (("ddim", (3, -1)), "descending order"),
        (("ddim", 5, 1.5), "eta is the noise of ddim and dpm"),
        (("own", 5, 0.5), "eta is the noise of ddim and dpm"),
        (("own", True), "at least one step"),
    ],
)
def test_what_is_no_sampler(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(*arguments)
