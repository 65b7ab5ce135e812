"""Products in bfloat16 and bytes, against PyTorch with the same operands rounded; and where they are refused.

Both round what differs in its last digits, now and then to different neighbours: so a few numbers differ by what one
operand's rounding makes of them, and all others by what single precision does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
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
from bacinfer.core.engines.fused import instructions as op
from bacinfer.core.engines.fused import native, program_cache, runners
from bacinfer.core.engines.fused.affine import Affine, in_bytes
from bacinfer.core.engines.fused.denoiser import FeedForwardWeights, SelfAttentionWeights
from bacinfer.core.engines.fused.native_library import NativeUnavailableError
from bacinfer.core.engines.fused.program import Program
from core.fused.fused_helpers import LEFT_OUT, act, draw_policy, leave_out, make_policy
from core.fused.test_fused_engine import without_compiler
from core.fused.test_native import DITS, POLICIES, make_program
from helpers import TinyPolicy
from tiny_policies import VARIANTS, K

PUSHT = Path("assets/pusht/pusht_transformer.ckpt")
PRECISIONS = ("bf16", "int8")
ERROR = 5e-5  # of a block's largest value, on average; rounding makes 1e-3 of it
ONE_ROUNDING = {"bf16": 2e-3, "int8": 1e-2}  # of the largest value, where an operand went to its other neighbour
NOTICEABLE = 1e-4  # what rounding does to normalised actions, RMS; and of a shipped policy it does at most
MOVED = 0.01


@pytest.fixture(params=LEFT_OUT)
def _vectors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code for the processor's instructions, all or some of them."""
    leave_out(request.param, monkeypatch)


def in_bfloat16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def in_rows_of_bytes(x: Tensor) -> Tensor:
    whole, units = in_bytes(x)
    return whole * units[:, None]


ROUND = {"bf16": in_bfloat16, "int8": in_rows_of_bytes}


class RoundedAffine(Affine):
    """Both factors are rounded; products and sums are in single precision."""

    precision: str

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            x, weight = ROUND[self.precision](x), ROUND[self.precision](self.weight)
            return torch.addmm(self.bias, x, weight.t(), out=out)


def rounded(weights: Any, precision: str) -> Any:
    """The weights of a block with which its instruction computes what compiled code does in a precision."""
    if not isinstance(weights, (SelfAttentionWeights, FeedForwardWeights)):
        return weights
    affine = type("", (RoundedAffine,), {"precision": precision})
    parts = {name: part for name, part in vars(weights).items() if isinstance(part, Affine)}
    return replace(weights, **{name: affine(part.weight, part.bias) for name, part in parts.items()})


def act_rounded(policy: Any, plan: Any, precision: str, batch: int = 3, call: Callable[..., Tensor] = act) -> Tensor:
    """What the program puts out from Python, with rounded operands."""
    make_constants = program_cache.Constants
    with pytest.MonkeyPatch.context() as monkeypatch:

        def constants(*arguments: Any) -> Any:
            made = make_constants(*arguments)
            made.weights = [rounded(weights, precision) for weights in made.weights]
            return made

        without_compiler(monkeypatch)
        monkeypatch.setattr(program_cache, "Constants", constants)
        monkeypatch.setattr(program_cache, "compare", lambda *_: None)
        return call(bacinfer.apply(copy.deepcopy(policy), plan, engine="fused"), batch)


def act_in(precision: str, policy: Any, plan: Any, engine: str = "fused", batch: int = 3) -> Tensor:
    return act(bacinfer.apply(copy.deepcopy(policy), plan, engine=engine, precision=precision), batch)


# -- what it computes ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_vectors")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", [*POLICIES, *DITS])
@torch.no_grad()
def test_blocks_compute_what_pytorch_does_with_rounded_operands(variant: str, precision: str) -> None:
    program = make_program(variant)
    residuals = program.buffers.residuals
    for block in program.blocks:
        found, single = (run_block(program, block, which).clone() for which in (precision, None))
        program.encode_condition()
        replace(block, weights=rounded(block.weights, precision)).run(program.buffers)
        expected = residuals[block.block]
        largest = expected.abs().max()
        error, of_single = ((other - expected).abs() / largest for other in (found, single))
        assert error.max() < ONE_ROUNDING[precision]
        assert error.mean() < ERROR
        assert isinstance(block, op.CrossAttention) or of_single.mean() > 5 * ERROR


def run_block(program: Program, block: Any, precision: str | None) -> Tensor:
    alone = copy.copy(program)
    alone.instructions = [block]
    runners.NativeProgram(alone, precision=precision).run()
    return program.buffers.residuals[block.block]


@pytest.mark.usefixtures("_vectors")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_actions_are_those_of_rounded_operands(variant: str, precision: str) -> None:
    policy = make_policy(variant)
    every = CacheSchedule(K, {block.key: range(0, K, 2) for block in find_blocks(policy.model)})
    for plan in (SamplingPlan(), SamplingPlan(every)):
        if policy.num_inference_steps != K and plan.cache is not None:
            continue
        expected = act_rounded(policy, plan, precision)
        moved = rms(act(bacinfer.apply(copy.deepcopy(policy), plan)) - expected)
        assert moved > NOTICEABLE
        assert rms(act_in(precision, policy, plan) - expected) < moved / 2


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_random_schedules_shapes_and_schedulers_are_those_of_rounded_operands(data: st.DataObject) -> None:
    policy, schedule, batch = draw_policy(data)
    plan = SamplingPlan(schedule)
    precision = data.draw(st.sampled_from(PRECISIONS))
    left_out = data.draw(st.sampled_from(LEFT_OUT))

    def is_that(batch: int) -> bool:
        expected = act_rounded(policy, plan, precision, batch)
        moved = rms(act(bacinfer.apply(copy.deepcopy(policy), plan), batch) - expected)
        with pytest.MonkeyPatch.context() as monkeypatch:
            leave_out(left_out, monkeypatch)
            found = act_in(precision, policy, plan, batch=batch)
        return rms(found - expected) <= max(moved / 2, NOTICEABLE)

    # an operand that goes to its other neighbour at an early step can move a trajectory as far as rounding does
    assert any(is_that(batch + more) for more in range(3))


def rms(difference: Tensor) -> float:
    return difference.square().mean().sqrt().item()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
@pytest.mark.parametrize("batch", [1, 5])
def test_threads_give_the_same_actions_every_time(
    num_threads: int, batch: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "MULTIPLICATIONS_OF_A_THREAD", 1)
    policy = bacinfer.apply(make_policy(), SamplingPlan(), precision=precision)
    alone, before = act(policy, batch), torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        found = [act(policy, batch) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(other, found[0]) for other in found)
    part = {"bf16": 0.5, "int8": 1.0}[precision]  # in bytes, each thread has units of its own for its hidden columns
    assert rms(found[0] - alone) < part * rms(act(make_policy(), batch) - alone)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_shipped_policies_actions_move_by_little(precision: str) -> None:
    policy = bacinfer.load_policy(PUSHT)
    plan = SamplingPlan(sampler=Sampler("own", 10))
    observation = {"obs": torch.full((8, policy.n_obs_steps, policy.obs_dim), 256.0)}

    def normalised(**precision: str) -> Tensor:
        torch.manual_seed(0)
        bacinfer.apply(policy, plan, **precision)
        return policy.normalizer["action"].normalize(policy.predict_action(observation)["action_pred"])

    assert NOTICEABLE < rms(normalised(precision=precision) - normalised()) < MOVED


# -- what happens to the policy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@torch.no_grad()
def test_changed_weights_are_seen_at_the_next_call(precision: str) -> None:
    policy = bacinfer.apply(make_policy(), SamplingPlan(), precision=precision)
    before = act(policy)
    for layer in policy.model.decoder.layers:
        layer.linear1.weight *= 1.5
    after = act(policy)
    assert rms(after - before) > NOTICEABLE
    bacinfer.remove(policy)
    assert torch.equal(after, act_in(precision, policy, SamplingPlan()))


def test_a_policy_is_told_from_its_own_precision_and_restored() -> None:
    policy = make_policy()
    plain = act(policy)
    for precision in ("bf16", None, "int8"):
        bacinfer.apply(policy, SamplingPlan(), precision=precision)
        found = bacinfer.summary(policy)
        assert (found.engine, found.precision) == ("fused", precision)
        assert (f"in {precision}" in str(found)) == (precision is not None)
    act(policy)
    bacinfer.remove(policy)
    assert torch.equal(act(policy), plain)
    assert bacinfer.summary(policy).precision is None


# -- what is refused -------------------------------------------------------------------------------------------------


def test_unknown_precisions_and_engines_without_it_are_refused() -> None:
    policy = make_policy()
    with pytest.raises(ValueError, match="unknown precision 'fp8'; there is bf16, int8"):
        bacinfer.apply(policy, SamplingPlan(), precision="fp8")
    with pytest.raises(ValueError, match="'eager' computes blocks by the policy's own code, not in 'bf16'"):
        bacinfer.apply(policy, SamplingPlan(), engine="eager", precision="bf16")
    for precision in PRECISIONS:
        with pytest.raises(ValueError, match=f"precision '{precision}' is not to be had"):
            bacinfer.apply(policy, SamplingPlan(), engine="cuda_graph", precision=precision)
    assert bacinfer.summary(policy).engine is None


def test_auto_refuses_what_it_would_leave_to_the_eager_engine() -> None:
    with pytest.raises(ValueError, match=r"precision 'bf16' is not to be had for this policy: no program was written"):
        bacinfer.apply(TinyPolicy(), SamplingPlan(), precision="bf16")

    class Other(type(make_policy())):  # type: ignore[misc]
        def conditional_sample(
            self, condition_data: Any, condition_mask: Any, cond: Any = None, generator: Any = None, **kwargs: Any
        ) -> Any:
            return super().conditional_sample(condition_data, condition_mask, cond, generator, **kwargs)

    policy = make_policy()
    policy.__class__ = Other
    with pytest.raises(ValueError, match=r"Other\.conditional_sample is not a function that programs were written for"):
        bacinfer.apply(policy, SamplingPlan(), precision="bf16")
    assert torch.equal(
        act_in("bf16", policy, SamplingPlan()), act_in("bf16", make_policy(), SamplingPlan())
    )  # if asked for


def test_bytes_are_for_compiled_code_alone() -> None:
    runners.check_device("cuda_graph", torch.device("cuda"), "bf16")
    with pytest.raises(
        UnsupportedPolicyError, match="the engine 'fused' on a CPU has that; this is 'cuda_graph' on cuda"
    ):
        runners.check_device("cuda_graph", torch.device("cuda"), "int8")


@pytest.mark.usefixtures("_vectors")
@torch.no_grad()
def test_no_row_of_bytes_hides_what_is_not_finite() -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        program = make_program("causal")
        block = next(block for block in program.blocks if isinstance(block, op.FeedForward))
        program.buffers.x[4, 3] = value
        finite = run_block(program, block, "int8").isfinite()
        assert not finite[4].any()
        assert finite[:4].all()


def test_what_compiled_code_cannot_run_is_an_error_at_the_call() -> None:
    policy = bacinfer.apply(make_policy(), SamplingPlan(), precision="bf16")
    for layer in policy.model.decoder.layers:
        layer.activation = nn.SiLU()
    with pytest.raises(RuntimeError, match=r"precision 'bf16' is not to be had for this policy: .*activation is SiLU"):
        act(policy)
    policy = bacinfer.apply(make_policy(), SamplingPlan(), precision="bf16")
    with pytest.raises(RuntimeError, match="single precision on the CPU"), torch.autocast("cpu", torch.bfloat16):
        act(policy)


def test_rows_whose_sums_in_bytes_might_overflow_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy()
    hidden = policy.model.decoder.layers[0].linear1.out_features
    for most, refused in ((hidden, False), (hidden - 1, True)):
        monkeypatch.setattr(native, "MOST_BYTES_OF_A_ROW", most)
        act_in("bf16", policy, SamplingPlan())
        if refused:
            with pytest.raises(RuntimeError, match=f"sums of more than {most} products of bytes might overflow"):
                act_in("int8", policy, SamplingPlan())
        else:
            act_in("int8", policy, SamplingPlan())


def test_without_a_compiler_it_is_refused_before_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable() -> Any:
        raise NativeUnavailableError("there is no C++ compiler (c++)")

    monkeypatch.setattr(runners, "native_library", unavailable)
    with pytest.raises(ValueError, match=r"there is no C\+\+ compiler"):
        bacinfer.apply(make_policy(), SamplingPlan(), precision="bf16")
