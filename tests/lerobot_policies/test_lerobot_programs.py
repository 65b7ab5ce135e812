"""LeRobot's multi-task DiT as a program of the fused engine, as `auto` chooses it. Needs lerobot."""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

if importlib.util.find_spec("lerobot") is None:
    pytest.skip("needs lerobot, in an environment of its own", allow_module_level=True)

from lerobot.policies.multi_task_dit import modeling_multi_task_dit

import bacinfer.lerobot
import tiny_lerobot as tiny
from bacinfer import CacheSchedule, Sampler, SamplingPlan
from bacinfer.lerobot.registry import SUPPORTED_TYPES
from stand_in_cuda import policies_are_on_cuda, stand_in_for_cuda

CASES: dict[str, dict[str, Any]] = {
    "DDPM": {},
    "DDIM": {
        "noise_scheduler_type": "DDIM",
        "prediction_type": "sample",
        "use_rope": False,
        "use_positional_encoding": True,
    },
    "samples": {"prediction_type": "sample"},
    "Euler": {"objective": "flow_matching"},
    "Runge-Kutta": {"objective": "flow_matching", "integration_method": "rk4", "num_integration_steps": 3},
}
K = 10
ROUNDING, VISIBLE = 1e-4, 1e-3  # of actions in [-1, 1] and of those of a flow, which are around 1


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Makes the policy of a case, or gives it again."""
    directory, policies = tmp_path_factory.mktemp("policies"), dict[str, Any]()

    def make(case: str) -> Any:
        if case not in policies:
            policies[case] = tiny.multi_task_dit(directory, **CASES[case])
        return bacinfer.lerobot.remove(policies[case])

    return make


def act(policy: Any, batch: int = 2) -> Tensor:
    """The whole trajectory at the first observation of an episode."""
    torch.manual_seed(5)
    with torch.no_grad():
        return bacinfer.lerobot.handle(policy)(tiny.observation(policy, batch=batch))


def act_with(policy: Any, plan: SamplingPlan | CacheSchedule, engine: str, batch: int = 2) -> Tensor:
    """What a policy does by a plan, which is removed again."""
    bacinfer.lerobot.apply(policy, plan, engine=engine)
    try:
        found = act(policy, batch)
        assert bacinfer.lerobot.summary(policy).engine == engine
        return found
    finally:
        bacinfer.lerobot.remove(policy)


def periodic(policy: Any, interval: int = 3) -> CacheSchedule:
    found = bacinfer.lerobot.summary(policy)
    return CacheSchedule.periodic(found.blocks, found.num_inference_steps, interval)


def assert_equal_up_to_rounding(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("case", CASES)
def test_auto_runs_it_as_a_program(case: str, made: Callable[[str], Any]) -> None:
    policy = made(case)
    plain = act(policy)
    bacinfer.lerobot.apply(policy, SamplingPlan())
    assert_equal_up_to_rounding(act(policy), plain)
    assert bacinfer.lerobot.summary(policy).engine == "fused"
    cached = act_with(policy, periodic(policy), "eager")
    assert (cached - plain).abs().max() > VISIBLE
    assert_equal_up_to_rounding(act_with(policy, periodic(policy), "fused"), cached)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_plans_of_all_kinds_equal_the_eager_engine(made: Callable[[str], Any], data: st.DataObject) -> None:
    # (predicting noise, networks that were not trained magnify rounding where few steps are taken)
    policy = made(data.draw(st.sampled_from([case for case in CASES if case != "DDPM"])))
    N = data.draw(st.integers(1, 12))
    samplers = [Sampler("own", N)]
    if policy.config.is_diffusion:
        samplers += [
            Sampler("ddim", N),
            Sampler("ddim", N, 0.5),
            Sampler("dpm", N, 0.5),
            Sampler("own", tuple(range(9 * N - 9, -1, -9))),
        ]
    calls = N * (4 if getattr(policy.config, "integration_method", "") == "rk4" else 1)
    updates = st.sets(st.integers(1, max(1, calls - 1)))
    steps = {
        key: (0, *sorted(step for step in data.draw(updates) if step < calls))
        for key in bacinfer.lerobot.summary(policy).blocks
    }
    plan = SamplingPlan(CacheSchedule(calls, steps), data.draw(st.sampled_from(samplers)))
    batch = data.draw(st.integers(1, 3))
    found, expected = (act_with(policy, plan, engine, batch) for engine in ("fused", "eager"))
    assert_equal_up_to_rounding(found, expected)


@pytest.mark.parametrize("case", ["DDPM", "DDIM", "Euler", "Runge-Kutta"])
def test_autocast_is_followed(case: str, made: Callable[[str], Any]) -> None:
    policy = made(case)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (act_with(policy, SamplingPlan(), engine) for engine in ("fused", "eager"))
        bacinfer.lerobot.apply(policy, SamplingPlan())
        act(policy)
    assert bacinfer.lerobot.summary(policy).engine == "fused"  # its comparison let it pass
    if case != "DDPM":  # halves are magnified where noise is predicted
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_half_precision_by_choice(made: Callable[[str], Any]) -> None:
    policy = made("DDIM")
    plain = act(policy)
    bacinfer.lerobot.apply(policy, SamplingPlan(), precision="bf16")
    found = act(policy)
    assert bacinfer.lerobot.summary(policy).precision == "bf16"
    assert not torch.equal(found, plain)
    torch.testing.assert_close(found, plain, rtol=0.05, atol=0.05)


def test_the_random_stream_is_that_of_the_plain_policy(made: Callable[[str], Any]) -> None:
    policy = made("DDPM")
    act(policy)
    after = torch.get_rng_state()
    for _ in range(2):  # the first call compiles
        act_with(policy, SamplingPlan(), "fused")
        assert torch.equal(torch.get_rng_state(), after)


def test_changes_are_noticed(made: Callable[[str], Any]) -> None:
    policy = copy.deepcopy(made("DDPM"))
    plan = periodic(policy)
    bacinfer.lerobot.apply(policy, plan)
    before = act(policy)
    for change in (
        lambda: policy.noise_predictor.transformer_blocks[0].adaLN_modulation[1].weight.data.mul_(1.5),
        lambda: setattr(policy.noise_predictor.output_proj, "bias", torch.nn.Parameter(torch.ones(tiny.MOVES))),
        lambda: policy.objective.noise_scheduler.alphas_cumprod.mul_(0.9),
    ):
        change()
        changed = act(policy)
        assert (changed - before).abs().max() > VISIBLE
        before = changed
        assert_equal_up_to_rounding(changed, act_with(copy.deepcopy(policy), plan, "eager"))


def test_another_number_of_steps_is_an_error(made: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    counted = {"DDPM": ("objective", "num_inference_steps"), "Euler": ("config", "num_integration_steps")}
    for case, (owner, name) in counted.items():
        policy = made(case)
        bacinfer.lerobot.apply(policy, SamplingPlan())
        monkeypatch.setattr(getattr(policy, owner), name, 9)
        with pytest.raises(RuntimeError, match="takes 9 steps, but the plan was applied for K = 10"):
            act(policy)
        monkeypatch.undo()


def test_the_integrator_may_change(made: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = made("Euler")
    bacinfer.lerobot.apply(policy, SamplingPlan())
    act(policy)
    monkeypatch.setattr(policy.config, "integration_method", "rk4")
    with pytest.raises(RuntimeError, match="takes 40 steps, but the plan was applied for K = 10"):
        act(policy)
    bacinfer.lerobot.remove(policy)
    assert_equal_up_to_rounding(act_with(policy, SamplingPlan(), "fused"), act(policy))


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("DiffusionTransformer", "forward"),
        ("RoPEAttention", "forward"),
        ("RotaryPositionalEmbedding", "_rotate_half"),
        ("SinusoidalPosEmb", "forward"),
        ("DiffusionObjective", "conditional_sample"),
    ],
)
def test_other_code_is_left_to_the_eager_engine(
    owner: str, name: str, made: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    policy = made("DDPM")
    known = getattr(modeling_multi_task_dit, owner)
    original = getattr(known, name)
    monkeypatch.setattr(known, name, lambda self, *args, **kwargs: original(self, *args, **kwargs) * 0.9)
    plain = act(policy)
    with caplog.at_level(logging.WARNING, "bacinfer"):
        bacinfer.lerobot.apply(policy, SamplingPlan())
    assert f"{owner}.{name} is not a function that programs were written for" in caplog.text
    assert torch.equal(act(policy), plain)
    bacinfer.lerobot.remove(policy)


@pytest.mark.parametrize("case", CASES)
def test_on_cuda_auto_captures_it(case: str, made: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = made(case)
    eager = act_with(policy, periodic(policy), "eager")
    graphs = stand_in_for_cuda(monkeypatch)
    policies_are_on_cuda(monkeypatch)
    bacinfer.lerobot.apply(policy, periodic(policy))
    for _ in range(2):
        assert_equal_up_to_rounding(act(policy), eager)
    assert bacinfer.lerobot.summary(policy).engine == "cuda_graph"
    assert graphs[-2].replays == 2
    bacinfer.lerobot.apply(policy, SamplingPlan(), precision="bf16")
    with pytest.raises(RuntimeError, match="precision 'bf16' is not to be had for this policy: it takes GPU kernels"):
        act(policy)


@pytest.mark.parametrize("policy_type", [name for name in SUPPORTED_TYPES if name != "multi_task_dit"])
def test_there_is_no_program_for_others_on_any_device(
    policy_type: str, caplog: pytest.LogCaptureFixture, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = getattr(tiny, policy_type)(tmp_path)
    plain = act(policy)
    for is_on_cuda in (False, True):
        if is_on_cuda:
            stand_in_for_cuda(monkeypatch)
            policies_are_on_cuda(monkeypatch)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "bacinfer"):
            bacinfer.lerobot.apply(policy, SamplingPlan())
        assert "as no program was written for the denoising loop of a" in caplog.text
        assert torch.equal(act(policy), plain)
        assert bacinfer.lerobot.summary(policy).engine == "eager"
        with pytest.raises(ValueError, match="'bf16' is not to be had for this policy: no program was written for"):
            bacinfer.lerobot.apply(policy, SamplingPlan(), precision="bf16")


def test_copies_work_and_share_nothing(made: Callable[[str], Any]) -> None:
    policy = made("DDPM")
    bacinfer.lerobot.apply(policy, periodic(policy))
    cached = act(policy)
    other = copy.deepcopy(policy)
    assert torch.equal(act(other), cached)
    other.noise_predictor.output_proj.weight.data.zero_()
    act(other)
    assert torch.equal(act(policy), cached)
