"""The GPU kernels, as Triton's interpreter runs them on a CPU; on a GPU, `test_cuda_graph` runs them."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import bacinfer
from bacinfer.core.engines.fused import kernel_program, runners
from bacinfer.core.engines.fused.kernel_program import KernelProgram, obstacle_to_kernels
from bacinfer.core.engines.fused.native import NativeProgram
from bacinfer.core.engines.fused.program import Program
from bacinfer.core.engines.sampling_call import SamplingCall
from core.fused.fused_helpers import act, assert_agree, make_policy, make_scheduler, with_cache
from tiny_policies import VARIANTS, observations

pytest.importorskip("triton")

from triton.language import bfloat16, float32
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_create_dot = InterpreterBuilder.create_dot
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU")

# encoders mix tokens between steps, and an encoder's stack has a token of its own for the timestep
WITH_KERNELS = [variant for variant in VARIANTS if not variant.startswith("encoder_only")]


class Interpreted:
    """A program in interpreted kernels."""

    def __init__(self, program: Program, *, precision: str | None = None) -> None:
        self.program = program
        self.kernels = KernelProgram(program, halves=precision == "bf16")
        self.buffer_bytes = self.kernels.buffer_bytes

    def sample(self, call: SamplingCall) -> torch.Tensor:
        self.program.load(call)
        self.kernels.run()
        return self.program.buffers.trajectory.clone()


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine `fused` runs kernels instead of compiled code."""
    monkeypatch.setattr(runners, "NativeProgram", Interpreted)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", _dot_of_halves)


def _dot_of_halves(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    """A product also of bfloat16, which the interpreter keeps as integers and would multiply as such."""
    if a.dtype.scalar == bfloat16:
        a, b = (TensorHandle((x.data.astype("uint32") << 16).view("float32"), float32) for x in (a, b))
    return _create_dot(self, a, b, *rest)


def small(variant: str = "causal", *overrides: str, **settings: Any) -> Any:
    """A policy of three steps: an interpreter is slow."""
    return make_policy(variant, "policy.num_inference_steps=3", *overrides, **settings)


@pytest.mark.parametrize("variant", WITH_KERNELS)
def test_kernels_equal_the_eager_engine(variant: str) -> None:
    policy = small(variant)
    cached, eager = (with_cache(policy, engine, cache_threshold=2) for engine in ("fused", "eager"))
    call = partial(act, batch=2)
    assert_agree(call(cached), eager, call)


@pytest.mark.parametrize(
    "sizes",
    [
        ("horizon=19", "policy.model.n_emb=24", "policy.model.n_head=4"),
        ("horizon=11", "policy.model.n_emb=12", "policy.model.n_head=1"),
        ("horizon=10", "policy.model.n_emb=144", "policy.model.n_head=2", "policy.model.n_layer=1"),
    ],
)
def test_sizes_that_are_no_powers_of_two(sizes: tuple[str, ...]) -> None:
    policy = small("causal", *sizes)
    assert_agree(act(bacinfer.apply(small("causal", *sizes), bacinfer.SamplingPlan(), engine="fused")), policy)


def test_unclipped_ddim_with_another_prediction() -> None:
    settings = {"prediction_type": "v_prediction", "clip_sample": False}
    policy = small(scheduler=make_scheduler("ddim", **settings))
    assert_agree(act(with_cache(policy, "fused", cache_threshold=2)), with_cache(policy, "eager", cache_threshold=2))


def test_steps_of_second_order() -> None:
    plan = bacinfer.SamplingPlan(sampler=bacinfer.Sampler("dpm", (8, 5, 2), 0.5))
    eager = bacinfer.apply(small(), plan, engine="eager")
    assert_agree(act(bacinfer.apply(small(), plan, engine="fused")), eager)


@pytest.mark.parametrize("activation", [F.relu, torch.nn.GELU(approximate="tanh")])
def test_activations(activation: Any) -> None:
    policy = small()
    for layer in policy.model.decoder.layers:
        layer.activation = activation
    call = partial(act, batch=1)
    assert_agree(
        call(with_cache(policy, "fused", cache_threshold=3)), with_cache(policy, "eager", cache_threshold=3), call
    )


def test_steps_at_which_no_block_updates() -> None:
    policy = make_policy("causal", "policy.num_inference_steps=5")
    call = partial(act, batch=1)
    cached, eager = (with_cache(policy, engine, cache_threshold=4) for engine in ("fused", "eager"))
    assert_agree(call(cached), eager, call)


def test_halves_are_as_near_as_those_of_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = act(small(), batch=1)

    def rounding() -> float:
        policy = bacinfer.apply(small(), bacinfer.SamplingPlan(), engine="fused", precision="bf16")
        return (act(policy, batch=1) - exact).abs().max().item()

    found = rounding()
    monkeypatch.setattr(runners, "NativeProgram", NativeProgram)
    compiled = rounding()
    assert compiled / 8 < found < 4 * compiled  # the interpreter truncates where others round


def test_no_action_is_finite_where_the_plain_policys_is_not() -> None:
    policy = small()
    cached = with_cache(policy, "fused", cache_threshold=3)
    for value in (1e30, math.nan):
        obs = observations(2)["obs"]
        obs[1] = value
        with torch.no_grad():
            for either in (policy, cached):
                action = either.predict_action({"obs": obs})["action"]
                assert not action[1].isfinite().any()
                assert action[0].isfinite().all()


def test_what_there_are_no_kernels_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(runners, "NativeProgram", lambda program: found.append(obstacle_to_kernels(program)) or program)

    def obstacle(*overrides: str, variant: str = "causal", batch: int = 1) -> str:
        act(bacinfer.apply(small(variant, *overrides), bacinfer.SamplingPlan(), engine="fused"), batch)
        return found[-1]

    assert obstacle() == ""
    assert "decoder layers" in obstacle(variant="encoder_only")
    assert "130 tokens of all batch entries are more than the 128" in obstacle("horizon=10", batch=13)
    assert "the program has 10 of 528" in obstacle("horizon=10", "policy.model.n_emb=528", "policy.model.n_layer=1")
    monkeypatch.setattr(kernel_program, "find_spec", lambda name: None)
    assert obstacle() == "Triton is not installed"
