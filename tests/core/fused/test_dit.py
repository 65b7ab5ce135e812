"""Diffusion transformers with adaLN as programs: equal to the eager engine, refused where they are built otherwise."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bacinfer
from bacinfer import CacheSchedule, Sampler, SamplingPlan
from bacinfer.core.blocks import find_blocks
from bacinfer.core.engines.base import UnsupportedPolicyError
from bacinfer.core.engines.fused import native, runners
from bacinfer.core.engines.fused.native_library import NativeUnavailableError
from bacinfer.core.engines.fused.program import Program
from bacinfer.core.engines.sampling_call import SamplingCall
from core.fused import fused_helpers
from core.fused.fused_helpers import make_constants, make_scheduler
from core.fused.test_precision import NOTICEABLE, PRECISIONS, act_rounded, rms
from stand_in_cuda import policies_are_on_cuda, stand_in_for_cuda
from tiny_dit import CONDITION, HORIZON, TinyDiT, TinyDiTPolicy, tiny_dit_policy

VISIBLE = 1e-3  # a difference of normalised actions that rounding does not make


def make_policy(**sizes: Any) -> TinyDiTPolicy:
    # of a network that was not trained, samples are far from chaotic where it predicts them themselves, not their noise
    return tiny_dit_policy(make_scheduler(prediction_type="sample"), **sizes)


def observe(policy: Any, batch: int = 3) -> dict[str, Tensor]:
    condition = torch.rand(batch, CONDITION, generator=torch.Generator().manual_seed(4))
    return {"obs": condition.to(policy.model.input_proj.weight.dtype)}


def act(policy: Any, batch: int = 3) -> Tensor:
    return act_on(policy, observe(policy, batch))


def act_on(policy: Any, observation: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return policy.predict_action(observation)["action_pred"]


assert_agree = partial(fused_helpers.assert_agree, call=act)


def with_plan(policy: Any, plan: SamplingPlan | CacheSchedule, engine: str) -> Any:
    return bacinfer.apply(copy.deepcopy(policy), plan, engine=engine)


def periodic(policy: Any, interval: int = 3, K: int = 10) -> CacheSchedule:
    return CacheSchedule.periodic([block.key for block in find_blocks(policy.model)], K, interval)


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(program: Any) -> Any:
        raise NativeUnavailableError("there is no compiler in this test")

    monkeypatch.setattr(runners, "NativeProgram", unavailable)


@pytest.fixture(params=["native", "python"])
def executor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs in compiled code, and from Python as where there is no compiler."""
    if request.param == "python":
        without_compiler(monkeypatch)
    else:
        native.native_library()  # an error here, rather than a test of the other


@pytest.mark.usefixtures("executor")
@pytest.mark.parametrize("sizes", [{}, {"rotary": False}, {"positions": False}, {"width": 40, "num_layers": 1}])
def test_equals_the_eager_engine_and_without_caching_the_policy(sizes: dict[str, Any]) -> None:
    policy = make_policy(**sizes)
    assert_agree(act(with_plan(policy, SamplingPlan(), "fused")), policy)
    eager = with_plan(policy, periodic(policy), "eager")
    assert_agree(act(with_plan(policy, periodic(policy), "fused")), eager)
    assert (act(eager) - act(policy)).abs().max() > VISIBLE  # the cache changes something


def update_steps(num_steps: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.sets(st.integers(1, max(1, num_steps - 1)), max_size=num_steps).map(
        lambda steps: (0, *sorted(s for s in steps if s < num_steps))
    )


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_random_schedules_samplers_and_shapes_equal_the_eager_engine(data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, 12))
    sampler = data.draw(
        st.sampled_from([Sampler("own", steps), Sampler("ddim", steps), Sampler("ddim", steps, eta=0.5)])
    )
    width, heads = data.draw(st.sampled_from([(16, 2), (12, 1), (24, 4), (40, 2)]))
    policy = tiny_dit_policy(
        make_scheduler(data.draw(st.sampled_from(["ddpm", "ddim"])), 12, prediction_type="sample"),
        num_inference_steps=12,
        width=width,
        num_heads=heads,
        num_layers=data.draw(st.integers(1, 3)),
        rotary=data.draw(st.booleans()),
        positions=data.draw(st.booleans()),
    )
    keys = [block.key for block in find_blocks(policy.model)]
    cache = CacheSchedule(steps, {key: data.draw(update_steps(steps)) for key in keys})
    plan = SamplingPlan(cache, sampler)
    call = partial(act, batch=data.draw(st.integers(1, 5)))
    with pytest.MonkeyPatch.context() as monkeypatch:
        if data.draw(st.booleans()):
            without_compiler(monkeypatch)
        found = call(with_plan(policy, plan, "fused"))
    assert_agree(found, with_plan(policy, plan, "eager"), call=call)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_actions(batch: int, num_threads: int) -> None:
    policy, before = make_policy(width=100), torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        fused = with_plan(policy, periodic(policy), "fused")
        found = [act(fused, batch) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(other, found[0]) for other in found)
    assert_agree(found[0], with_plan(policy, periodic(policy), "eager"), call=partial(act, batch=batch))


@pytest.mark.usefixtures("executor")
@pytest.mark.parametrize("activation", [nn.GELU(), nn.ReLU(), nn.SiLU()])
def test_the_activation_may_be_another(activation: nn.Module) -> None:
    policy = make_policy()
    for layer in policy.model.transformer_blocks:
        layer.mlp[1] = activation
    assert_agree(act(with_plan(policy, periodic(policy), "fused")), with_plan(policy, periodic(policy), "eager"))


@pytest.mark.usefixtures("executor")
def test_activations_far_from_zero() -> None:
    policy = make_policy()
    with torch.no_grad():
        for layer in policy.model.transformer_blocks:
            layer.mlp[0].weight *= 40
    # one of the actions is ill-conditioned: how near the policy's own is to it is chance
    rounding = fused_helpers.effect_of_rounding(policy, act)
    assert_agree(act(with_plan(policy, SamplingPlan(), "fused")), policy, rounding=rounding)


@pytest.mark.usefixtures("executor")
def test_no_action_is_finite_where_the_policys_is_not() -> None:
    policy = make_policy()
    fused = with_plan(policy, periodic(policy), "fused")
    expected = act(fused)
    for value in (math.inf, -math.inf, math.nan):
        observation = observe(policy)
        observation["obs"][1, 2] = value
        assert not act_on(policy, observation)[1].isfinite().any()
        found = act_on(fused, observation)
        assert not found[1].isfinite().any()
        assert torch.equal(found[[0, 2]], expected[[0, 2]])  # the others never meet it


@pytest.mark.usefixtures("executor")
def test_autocast_is_followed() -> None:
    # without noise, of which halves draw another
    policy = tiny_dit_policy(make_scheduler("ddim", prediction_type="sample"))
    fused = with_plan(policy, periodic(policy, 2), "fused")
    exact = act(fused)
    with torch.autocast("cpu", torch.bfloat16):
        halved = act(fused)
    # (the eager engine's are 0.004 from it)
    assert 1e-5 < (halved - exact).abs().max() < 0.03
    assert torch.equal(act(fused), exact)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("sizes", [{"width": 40}, {"rotary": False}])
def test_products_in_a_precision_are_those_of_rounded_operands(sizes: dict[str, Any], precision: str) -> None:
    policy = make_policy(**sizes)
    for plan in (SamplingPlan(), SamplingPlan(periodic(policy))):
        expected = act_rounded(policy, plan, precision, call=act)
        moved = rms(act(with_plan(policy, plan, "fused")) - expected)
        assert moved > NOTICEABLE
        rounded = bacinfer.apply(copy.deepcopy(policy), plan, engine="fused", precision=precision)
        assert rms(act(rounded) - expected) < moved / 2


def test_on_cuda_it_is_a_graph_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = stand_in_for_cuda(monkeypatch)
    policies_are_on_cuda(monkeypatch)
    policy = make_policy()
    cached = with_plan(policy, periodic(policy), "cuda_graph")
    for _ in range(2):
        assert_agree(act(cached), with_plan(policy, periodic(policy), "eager"))
    assert [graph.replays for graph in graphs] == [
        1,
        0,
        2,
        2,
    ]  # of the comparison, and its own; each with that of noise
    halved = bacinfer.apply(copy.deepcopy(policy), SamplingPlan(), engine="cuda_graph", precision="bf16")
    with pytest.raises(
        RuntimeError, match="bf16' is not to be had for this policy: it takes GPU kernels, and they are"
    ):
        act(halved)


def scale_modulation(policy: Any) -> None:
    with torch.no_grad():
        policy.model.transformer_blocks[1].adaLN_modulation[1].weight[:, -1] *= -2  # of the condition alone


def scale_modulation_unseen(policy: Any) -> None:
    for parameter in policy.model.parameters():
        parameter.data.mul_(0.9)


def move_rotation(policy: Any) -> None:
    policy.model.transformer_blocks[0].attn.rope._sin_cached.neg_()


@pytest.mark.usefixtures("executor")
@pytest.mark.parametrize("change", [scale_modulation, scale_modulation_unseen, move_rotation])
def test_changes_are_noticed(change: Callable[[Any], None]) -> None:
    policy = make_policy()
    bacinfer.apply(policy, periodic(policy), engine="fused")
    before = act(policy)
    assert torch.equal(act(policy), before)
    change(policy)
    changed = act(policy)
    assert (changed - before).abs().max() > VISIBLE
    assert_agree(changed, with_plan(bacinfer.remove(policy), periodic(policy), "eager"))


# -- what it cannot run ----------------------------------------------------------------------------------------------


def with_norms_of_their_own(policy: Any) -> None:
    policy.model.transformer_blocks[0].norm1 = nn.LayerNorm(12)


def with_another_modulation(policy: Any) -> None:
    policy.model.transformer_blocks[1].adaLN_modulation[0] = nn.Tanh()


def with_a_deeper_mlp(policy: Any) -> None:
    policy.model.transformer_blocks[1].mlp.append(nn.Identity())


def with_another_head(policy: Any) -> None:
    policy.model.output_proj = nn.Sequential(policy.model.output_proj)


def with_a_hook(policy: Any) -> None:
    policy.model.time_mlp.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_norms_of_their_own, r"transformer_blocks\.0\.norm1 has weights beside those of the modulation"),
        (with_another_modulation, r"transformer_blocks\.1\.adaLN_modulation\.0 is a Tanh, not a SiLU"),
        (with_a_deeper_mlp, r"transformer_blocks\.1\.mlp is another module than expected"),
        (with_another_head, "output_proj is a Sequential, not a Linear"),
        (with_a_hook, "time_mlp has forward hooks"),
    ],
)
def test_what_it_cannot_run_is_refused(change: Callable[[Any], None], reason: str) -> None:
    policy = make_policy()
    change(policy)
    with pytest.raises(ValueError, match=f"engine 'fused' cannot run this policy.*{reason}"):
        bacinfer.apply(policy, SamplingPlan(), engine="fused")


class Damped(TinyDiT):
    def forward(self, x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        return 0.9 * super().forward(x, timestep, condition)


def test_what_computes_something_else_is_not_replaced() -> None:
    policy = make_policy()
    policy.model.__class__ = Damped
    with pytest.raises(RuntimeError, match="its sampling computes something else"):
        act(with_plan(policy, SamplingPlan(), "fused"))


def test_auto_makes_programs_of_known_functions_only(caplog: pytest.LogCaptureFixture) -> None:
    policy = make_policy()
    with caplog.at_level(logging.WARNING, "bacinfer"):
        found = with_plan(policy, periodic(policy), "auto")
    assert "TinyDiT.forward is not a function that programs were written for" in caplog.text
    assert torch.equal(act(found), act(with_plan(policy, periodic(policy), "eager")))


def test_a_trajectory_longer_than_the_rotations_is_refused() -> None:
    given = torch.zeros(1, HORIZON + 1, 2)
    call = SamplingCall(given, given.bool(), torch.zeros(1, CONDITION), None, {})
    with pytest.raises(UnsupportedPolicyError, match=f"of {HORIZON} positions, the trajectory has {HORIZON + 1}"):
        Program(make_constants(make_policy(positions=False)), call)
