from __future__ import annotations

import copy
import gc
import logging
import math
import pickle
import threading
from functools import partial
from typing import Any

import dill
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bacinfer import FastDiffusionPolicy
from bacinfer.core.blocks import find_blocks
from bacinfer.core.engines.fused import native, runners
from bacinfer.core.engines.fused.native_library import NativeUnavailableError
from bacinfer.core.engines.fused.program import Program
from bacinfer.core.engines.observing import observe_residuals
from core.fused.fused_helpers import (
    LEFT_OUT,
    act,
    act_with,
    apply_cache,
    assert_agree,
    draw_policy,
    leave_out,
    make_policy,
    make_scheduler,
    remove_cache,
    with_cache,
)
from tiny_policies import VARIANTS, K, observations

VISIBLE = 1e-3  # a difference of normalised actions that rounding does not make


@pytest.fixture(params=["native", "python"])
def executor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Programs in compiled code, and from Python as where there is no compiler."""
    if request.param == "python":
        without_compiler(monkeypatch)
    else:
        native.native_library()  # an error here, rather than a test of the other
    return request.param


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(program: Any) -> Any:
        raise NativeUnavailableError("there is no compiler in this test")

    monkeypatch.setattr(runners, "NativeProgram", unavailable)


def block_keys(policy: Any) -> list[str]:
    return [block.key for block in find_blocks(policy.model)]


# -- equality --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("executor")
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_equals_the_eager_engine(variant: str) -> None:
    policy = make_policy(variant)
    eager = with_cache(policy, "eager", cache_threshold=3)
    assert_agree(act_with(policy, "fused", cache_threshold=3), eager)
    assert (act(eager) - act(policy)).abs().max() > VISIBLE  # the cache changes something


@pytest.mark.usefixtures("executor")
@pytest.mark.parametrize("variant", VARIANTS)
def test_without_caching_it_equals_the_plain_policy(variant: str) -> None:
    policy = make_policy(variant)
    assert_agree(act_with(policy, "fused", cache_mode="original"), policy)
    assert_agree(act_with(policy, "fused", cache_threshold=1), policy)


def test_a_small_difference_is_no_agreement() -> None:
    policy = make_policy()
    other = copy.deepcopy(policy)
    with torch.no_grad():
        other.model.head.weight *= 1 + 1e-5
    with pytest.raises(AssertionError, match="from double precision"):
        assert_agree(act(other), policy)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_random_schedules_shapes_and_schedulers_equal_the_eager_engine(data: st.DataObject) -> None:
    policy, schedule, batch = draw_policy(data)
    with pytest.MonkeyPatch.context() as monkeypatch:
        executor = data.draw(st.sampled_from(["python", *LEFT_OUT]))
        if executor == "python":
            without_compiler(monkeypatch)
        else:
            leave_out(executor, monkeypatch)
        found = act_with(policy, "fused", batch, schedule=schedule)
    assert_agree(found, with_cache(policy, "eager", schedule=schedule), partial(act, batch=batch))


@pytest.mark.parametrize("whose", ["PyTorch's", "its own"])
@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("variant", ["causal", "encoder_only", "condition_encoder"])
def test_any_number_of_threads_gives_the_same_actions(
    variant: str, batch: int, num_threads: int, whose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(variant)
    monkeypatch.setattr(native, "MULTIPLICATIONS_OF_A_THREAD", 1)
    if whose == "its own":
        monkeypatch.setattr(native, "openmp", lambda: (None, None))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        found = [act_with(policy, "fused", batch, cache_threshold=2) for _ in range(3)]
        assert all(torch.equal(other, found[0]) for other in found)
    finally:
        torch.set_num_threads(before)
    assert_agree(found[0], with_cache(policy, "eager", cache_threshold=2), partial(act, batch=batch))


@pytest.mark.usefixtures("executor")
def test_the_activation_may_be_another() -> None:
    for activation in (nn.functional.relu, nn.ReLU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU()):
        policy = make_policy()
        for layer in policy.model.decoder.layers:
            layer.activation = activation
        assert_agree(act_with(policy, "fused", cache_threshold=3), with_cache(policy, "eager", cache_threshold=3))


@pytest.mark.usefixtures("executor")
def test_layers_without_biases_and_a_norm_after_the_stack() -> None:
    policy = make_policy()
    width = policy.model.head.in_features
    policy.model.decoder.norm = nn.LayerNorm(width)
    policy.model.head.bias = policy.model.input_emb.bias = None
    for layer in policy.model.decoder.layers:
        layer.linear1.bias = layer.linear2.bias = layer.self_attn.in_proj_bias = None
        layer.multihead_attn.in_proj_bias = layer.multihead_attn.out_proj.bias = None
    assert_agree(act_with(policy, "fused", cache_threshold=3), with_cache(policy, "eager", cache_threshold=3))


@pytest.mark.usefixtures("executor")
def test_the_callers_generator_is_honoured() -> None:
    policy = make_policy()

    def sample(policy: Any, seed: int = 1) -> Tensor:
        policy.reset_cache()
        torch.manual_seed(seed)  # which must not matter
        given = torch.zeros(2, 16, 2, dtype=policy.dtype)
        condition = (observations(2)["obs"] / 512).to(policy.dtype)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(5)
            actions = policy.conditional_sample(given, given.bool(), cond=condition, generator=generator)
        return torch.cat([actions.flatten(), torch.randn(1, generator=generator)])

    fused = with_cache(policy, "fused")
    assert torch.equal(sample(fused, 1), sample(fused, 2))
    assert_agree(sample(fused), with_cache(policy, "eager"), sample)


@pytest.mark.usefixtures("executor")
def test_random_stream_is_that_of_the_plain_policy() -> None:
    for variant in ("causal", "inpainting"):
        policy = make_policy(variant)
        act(policy)
        after_plain = torch.get_rng_state()
        apply_cache(policy, engine="fused")
        for _ in range(2):  # the first call compiles
            act(policy)
            assert torch.equal(torch.get_rng_state(), after_plain)


class ImagePolicy(nn.Module):
    """Pictures to features to actions, with a loop of its own: a policy that shares no class but the transformer's."""

    def __init__(self, lowdim_policy: Any) -> None:
        super().__init__()
        self.obs_encoder = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Flatten(), nn.LazyLinear(20))
        self.model = lowdim_policy.model
        self.noise_scheduler = lowdim_policy.noise_scheduler
        self.num_inference_steps = lowdim_policy.num_inference_steps

    def conditional_sample(self, condition_data, condition_mask, cond=None, generator=None, **kwargs):  # type: ignore[no-untyped-def]
        trajectory = torch.randn(condition_data.shape, dtype=condition_data.dtype, generator=generator)
        self.noise_scheduler.set_timesteps(self.num_inference_steps)
        for t in self.noise_scheduler.timesteps:
            trajectory[condition_mask] = condition_data[condition_mask]
            output = self.model(trajectory, t, cond)
            trajectory = self.noise_scheduler.step(output, t, trajectory, generator=generator, **kwargs).prev_sample
        trajectory[condition_mask] = condition_data[condition_mask]
        return trajectory

    def predict_action(self, obs_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        images = obs_dict["image"].to(self.model.pos_emb)
        features = self.obs_encoder(images.flatten(0, 1)).view(*images.shape[:2], -1)
        given = features.new_zeros(len(images), 16, 2)
        return {"action_pred": self.conditional_sample(given, given.bool(), cond=features)}


@pytest.mark.usefixtures("executor")
def test_an_image_policy_with_a_loop_of_its_own_runs_fused_where_asked_for() -> None:
    torch.manual_seed(0)
    policy = ImagePolicy(make_policy()).eval()
    images = {"image": torch.rand(2, 2, 3, 12, 12)}
    policy.predict_action(images)  # lazy layers take their shapes

    def act_on_images(policy: Any) -> Tensor:
        torch.manual_seed(1)
        with torch.no_grad():
            return policy.predict_action(images)["action_pred"]

    auto, eager, fused = (with_cache(policy, engine, cache_threshold=3) for engine in ("auto", "eager", "fused"))
    assert torch.equal(act_on_images(auto), act_on_images(eager))
    assert FastDiffusionPolicy.summary(auto).engine == "eager"
    assert_agree(act_on_images(fused), eager, act_on_images)


# -- unusual inputs --------------------------------------------------------------------------------------------------


def act_on(policy: Any, obs: Tensor) -> Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return policy.predict_action({"obs": obs})["action_pred"]


def spoiled(value: float) -> Tensor:
    """Observations of three, of which the second one's latest holds a value that is no observation."""
    obs = observations(3)["obs"]
    obs[1, 1, 3] = value
    return obs


@pytest.mark.usefixtures("executor")
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_action_is_finite_where_the_plain_policys_is_not(variant: str) -> None:
    policy = make_policy(variant)
    others = [0, 2]
    for cache in ({"cache_mode": "original"}, {"cache_threshold": 3}):
        fused = with_cache(policy, "fused", **cache)
        expected = act_on(fused, observations(3)["obs"])[others]
        for value in (1e30, -1e30, 3e38, math.inf, -math.inf, math.nan):
            plain, found = act_on(policy, spoiled(value)), act_on(fused, spoiled(value))
            assert not plain[1].isfinite().any()
            assert not found[1].isfinite().any()
            assert torch.equal(found[others], expected)  # the others never meet it


@pytest.mark.parametrize("variant", ["causal", "inpainting", "encoder_only"])
def test_no_action_is_finite_where_halves_overflow(variant: str) -> None:
    policy = make_policy(variant)
    fused = with_cache(policy, "fused", cache_threshold=3)
    with torch.autocast("cpu", torch.float16):
        assert act_on(fused, observations(3)["obs"]).isfinite().all()
        for value in (1e8, 1e16):
            assert not act_on(policy, spoiled(value))[1].isfinite().any()
            assert not act_on(fused, spoiled(value))[1].isfinite().any()


@pytest.mark.usefixtures("executor")
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_empty_batch(variant: str) -> None:
    policy = make_policy(variant)
    fused = with_cache(policy, "fused", cache_threshold=3)
    for batch in (0, 2, 0):
        assert act(fused, batch).shape == act(policy, batch).shape


# -- half precision --------------------------------------------------------------------------------------------------


def test_autocast_is_followed() -> None:
    policy = make_policy()
    exact = act_with(policy, "fused", cache_threshold=2)
    apply_cache(policy, cache_threshold=2, engine="fused")
    with torch.autocast("cpu", torch.bfloat16):
        halved = act(policy)
    assert halved.dtype == torch.float32
    assert 1e-5 < (halved - exact).abs().max() < 0.2
    assert torch.equal(act(policy), exact)  # and left when it ends


def test_half_precision_weights() -> None:
    policy = make_policy()
    exact = act_with(policy, "fused", cache_threshold=2)
    halved = act(apply_cache(policy.to(torch.bfloat16), cache_threshold=2, engine="fused")).float()
    assert 1e-5 < (halved - exact).abs().max() < 0.2


def test_double_precision_weights() -> None:
    policy = make_policy().double()
    plain = {"cache_threshold": 3}
    found, expected = act_with(policy, "fused", **plain), act_with(policy, "eager", **plain)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # coefficients are single


# -- what may change between calls -----------------------------------------------------------------------------------


def fine_tune(policy: Any) -> None:
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.01)
    batch = {"obs": torch.rand(4, 16, 20) * 512, "action": torch.rand(4, 16, 2)}
    policy.compute_loss(batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def load_others(policy: Any) -> None:
    other = make_policy()
    fine_tune(other)
    policy.load_state_dict(other.state_dict())


def write_through_data(policy: Any) -> None:
    for parameter in policy.model.parameters():
        parameter.data.mul_(0.9)


def replace_module(policy: Any) -> None:
    policy.model.head = nn.Linear(16, 2)


def replace_parameter(policy: Any) -> None:
    policy.model.decoder.layers[0].linear1.weight = nn.Parameter(torch.zeros(64, 16))


def round_to_half(policy: Any) -> None:
    policy.to(torch.bfloat16).to(torch.float32)


def replace_scheduler(policy: Any) -> None:
    policy.noise_scheduler = make_scheduler("ddim", prediction_type="sample")


@pytest.mark.usefixtures("executor")
@pytest.mark.parametrize(
    "change",
    [
        *(fine_tune, load_others, write_through_data, replace_module),
        *(replace_parameter, round_to_half, replace_scheduler),
    ],
)
def test_changes_after_apply_cache_are_noticed(change: Any) -> None:
    policy = apply_cache(make_policy(), cache_threshold=3, engine="fused")
    before = act(policy)
    assert torch.equal(act(policy), before)
    torch.manual_seed(2)
    change(policy)
    changed = act(policy)
    assert (changed - before).abs().max() > VISIBLE
    assert_agree(changed, with_cache(remove_cache(policy), "eager", cache_threshold=3))


@pytest.mark.usefixtures("executor")
def test_batches_may_change_between_calls() -> None:
    policy = make_policy()
    fused, eager = (with_cache(policy, engine, cache_threshold=3) for engine in ("fused", "eager"))
    for batch in (2, 5, 1, 3, 4, 6, 2):  # more than are kept
        assert_agree(act(fused, batch), eager, partial(act, batch=batch))
    assert FastDiffusionPolicy.summary(fused).buffer_bytes > 0


def test_buffers_are_linear_in_the_batch() -> None:
    policy = apply_cache(make_policy(), cache_threshold=3, engine="fused")
    sizes = []
    for batch in (1, 2, 3):
        other = copy.deepcopy(policy)
        act(other, batch)
        sizes.append(FastDiffusionPolicy.summary(other).buffer_bytes)
    assert sizes[1] - sizes[0] == sizes[2] - sizes[1]
    assert 0 < sizes[0] <= sizes[1] - sizes[0] + 10_000


def test_inference_mode_before_and_after() -> None:
    policy = apply_cache(make_policy(), cache_threshold=3, engine="fused")
    with torch.inference_mode():
        torch.manual_seed(1)
        inside = policy.predict_action(observations(3))["action_pred"]
    assert torch.equal(act(policy), inside)


# -- removal, copies, threads ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("executor")
def test_removal_restores_the_policy_exactly() -> None:
    policy = make_policy()
    plain, attributes = act(policy), {name: set(vars(module)) for name, module in policy.named_modules()}
    timesteps = policy.noise_scheduler.timesteps.clone()
    apply_cache(policy, engine="fused")
    act(policy)
    assert torch.equal(policy.noise_scheduler.timesteps, timesteps)
    remove_cache(policy)
    assert torch.equal(act(policy), plain)
    assert {name: set(vars(module)) for name, module in policy.named_modules()} == attributes
    assert "conditional_sample" not in vars(policy)


@pytest.mark.usefixtures("executor")
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p)), lambda p: dill.loads(dill.dumps(p))],
    ids=["deepcopy", "pickle", "dill"],
)
def test_copies_work_and_share_nothing(duplicate: Any) -> None:
    policy = make_policy()
    act(policy)  # sets the scheduler's timesteps
    apply_cache(policy, cache_threshold=3, engine="fused")
    size = len(pickle.dumps(policy))
    cached = act(policy)
    assert len(pickle.dumps(policy)) == size  # programs are not part of it
    other = duplicate(policy)
    assert torch.equal(act(other), cached)
    for parameter in other.parameters():
        parameter.data.zero_()
    act(other)
    assert torch.equal(act(policy), cached)


def test_two_policies_each_in_its_thread() -> None:
    policies = [apply_cache(make_policy(), cache_threshold=n, engine="fused") for n in (2, 3, 4)]

    def sample(policy: Any) -> Tensor:
        given = torch.zeros(2, 16, 2)
        condition = observations(2)["obs"] / 512
        policy.reset_cache()
        with torch.no_grad():
            generator = torch.Generator().manual_seed(5)
            return policy.conditional_sample(given, given.bool(), cond=condition, generator=generator)

    expected = [sample(policy) for policy in policies]
    results: dict[int, list[Tensor]] = {i: [] for i in range(3)}
    threads = [
        threading.Thread(target=lambda i=i: results[i].extend(sample(policies[i]) for _ in range(20))) for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(results[i]) == 20 and all(torch.equal(r, expected[i]) for r in results[i]) for i in range(3))


def test_one_policy_in_two_threads_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = apply_cache(make_policy(), cache_threshold=3, engine="fused")
    expected = act(policy)
    errors: list[str] = []

    def intrude() -> None:
        try:
            act(policy)
        except RuntimeError as error:
            errors.append(str(error))

    def load(self: Any, call: Any, original: Any = Program.load) -> None:
        original(self, call)
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=intrude)
            thread.start()
            thread.join()

    monkeypatch.setattr(Program, "load", load)
    assert torch.equal(act(policy), expected)
    assert len(errors) == 1
    assert "copy.deepcopy(policy)" in errors[0]


def test_an_exception_leaves_a_usable_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = apply_cache(make_policy(), cache_threshold=3, engine="fused")
    expected = act(policy)

    def fail(self: Any, call: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Program, "load", fail)
        with pytest.raises(KeyboardInterrupt):
            act(policy)
    assert torch.equal(act(policy), expected)


# -- the eager engine beneath ----------------------------------------------------------------------------------------


def test_an_observer_sees_every_residual() -> None:
    policy = apply_cache(make_policy(), cache_threshold=3, engine="fused")
    expected = act_with(remove_cache(copy.deepcopy(policy)), "eager", cache_threshold=3)
    seen: list[tuple[str, int]] = []
    with observe_residuals(policy, lambda block, step, residual: seen.append((block.key, step))):
        assert torch.equal(act(policy), expected)
    assert seen == [(key, k) for k in range(K) for key in block_keys(policy)]


def test_own_loop_with_reset_cache() -> None:
    policy = make_policy()
    x, condition = torch.randn(2, 16, 2), observations(2)["obs"] / 512

    def loop(policy: Any) -> list[Tensor]:
        policy.reset_cache()
        return [policy.model(x, torch.tensor(k), condition) for k in range(K)]

    eager = loop(apply_cache(copy.deepcopy(policy), engine="eager"))
    assert all(map(torch.equal, loop(apply_cache(policy, engine="fused")), eager))


# -- what it cannot run ----------------------------------------------------------------------------------------------


def with_hook(policy: Any) -> None:
    policy.model.decoder.layers[0].register_forward_hook(lambda *_: None)


def with_post_norm(policy: Any) -> None:
    for layer in policy.model.decoder.layers:
        layer.norm_first = False


def with_another_scheduler(policy: Any) -> None:
    policy.noise_scheduler = make_scheduler(thresholding=True)


def with_another_head(policy: Any) -> None:
    policy.model.head = nn.Sequential(policy.model.head)


UNSUPPORTED = [
    (with_hook, "its decoder.layers.0 has forward hooks"),
    (with_post_norm, "post-norm"),
    (with_another_scheduler, "dynamic thresholding"),
    (with_another_head, "its head is a Sequential, not a Linear"),
]


@pytest.mark.parametrize(("change", "reason"), UNSUPPORTED)
def test_what_it_cannot_run_is_refused_at_once(change: Any, reason: str) -> None:
    policy = make_policy()
    change(policy)
    with pytest.raises(ValueError, match=f"engine 'fused' cannot run this policy.*{reason}.*engine='eager' can"):
        apply_cache(policy, engine="fused")
    assert "predict_action" not in vars(policy)


@pytest.mark.parametrize(("change", "reason"), UNSUPPORTED)
def test_auto_runs_it_eagerly_and_says_why_once(change: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    policy = make_policy()
    change(policy)
    with caplog.at_level(logging.WARNING, "bacinfer"):
        found = act(apply_cache(policy, cache_threshold=3))
        assert torch.equal(act(policy), found)
    assert [reason in record.getMessage() for record in caplog.records] == [True]
    summary = FastDiffusionPolicy.summary(policy)
    assert summary.engine == "eager"
    assert reason in str(summary)
    assert torch.equal(found, act_with(remove_cache(policy), "eager", cache_threshold=3))


# -- what it does not know -------------------------------------------------------------------------------------------


class DampedPolicy(type(make_policy())):  # type: ignore[misc]
    """Built like the others, but its loop does something more."""

    def conditional_sample(self, condition_data, condition_mask, cond=None, generator=None, **kwargs):  # type: ignore[no-untyped-def]
        return 0.9 * super().conditional_sample(condition_data, condition_mask, cond, generator, **kwargs)


class ClampedPolicy(type(make_policy())):  # type: ignore[misc]
    """Clamps the trajectory at a few steps in the middle of its loop."""

    bound = 0.5

    def conditional_sample(self, condition_data, condition_mask, cond=None, generator=None, **kwargs):  # type: ignore[no-untyped-def]
        trajectory = torch.randn(condition_data.shape, generator=generator)
        self.noise_scheduler.set_timesteps(self.num_inference_steps)
        for t in self.noise_scheduler.timesteps:
            trajectory[condition_mask] = condition_data[condition_mask]
            output = self.model(trajectory, t, cond)
            trajectory = self.noise_scheduler.step(output, t, trajectory, generator=generator, **kwargs).prev_sample
            if 0 < t < 4:
                trajectory = trajectory.clamp(-self.bound, self.bound)
        trajectory[condition_mask] = condition_data[condition_mask]
        return trajectory


class DrawingPolicy(ClampedPolicy):
    """Takes its noise from the global generator, whatever it is given."""

    bound = 1e9

    def conditional_sample(self, condition_data, condition_mask, cond=None, generator=None, **kwargs):  # type: ignore[no-untyped-def]
        return super().conditional_sample(condition_data, condition_mask, cond, None, **kwargs)


class ScaledModel(type(make_policy().model)):  # type: ignore[misc]
    def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        return 1.1 * super().forward(*args, **kwargs)


class ScaledDropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return 1.1 * super().forward(x)


class OwnDDPMScheduler(DDPMScheduler):
    def _get_variance(self, *args: Any, **kwargs: Any) -> Tensor:
        return super()._get_variance(*args, **kwargs)


OwnDDPMScheduler.__name__ = "DDPMScheduler"


def of_class(policy_class: type) -> Any:
    return lambda policy: setattr(policy, "__class__", policy_class)


UNKNOWN = {
    "DampedPolicy.conditional_sample": of_class(DampedPolicy),
    "ClampedPolicy.conditional_sample": of_class(ClampedPolicy),
    "DrawingPolicy.conditional_sample": of_class(DrawingPolicy),
    "ScaledModel.forward": lambda policy: setattr(policy.model, "__class__", ScaledModel),
    "ScaledDropout.forward": lambda policy: setattr(policy.model.drop, "__class__", ScaledDropout),
    "OwnDDPMScheduler._get_variance": lambda policy: setattr(policy.noise_scheduler, "__class__", OwnDDPMScheduler),
}


@pytest.mark.parametrize("function", UNKNOWN)
def test_auto_replaces_known_functions_only(function: str, caplog: pytest.LogCaptureFixture) -> None:
    policy = make_policy()
    UNKNOWN[function](policy)
    plain = act(policy)
    with caplog.at_level(logging.WARNING, "bacinfer"):
        found = act(apply_cache(policy, cache_threshold=3))
        assert torch.equal(act(policy), found)
    assert [f"{function} is not a function that" in record.getMessage() for record in caplog.records] == [True]
    assert torch.equal(found, act_with(remove_cache(policy), "eager", cache_threshold=3))
    assert torch.equal(act(policy), plain)


@pytest.mark.parametrize("function", [name for name in UNKNOWN if "Scheduler" not in name])
def test_what_computes_something_else_is_not_replaced(function: str) -> None:
    policy = make_policy()
    UNKNOWN[function](policy)
    with pytest.raises(RuntimeError, match=f"its sampling computes something else.*after {K} steps"):
        act_with(policy, "fused", cache_threshold=3)


def test_an_unknown_loop_is_compared_for_every_shape() -> None:
    policy = make_policy()
    policy.__class__ = ClampedPolicy
    policy.bound = 1e9  # so that it clamps nothing
    apply_cache(policy, cache_threshold=3, engine="fused")
    act(policy, batch=2)
    policy.bound = 0.5
    with pytest.raises(RuntimeError, match="its sampling computes something else"):
        act(policy, batch=3)


def test_comparing_leaves_the_global_generator_alone() -> None:
    policy = make_policy()
    policy.__class__ = DrawingPolicy
    apply_cache(policy, engine="fused")
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="its sampling computes something else"):
        policy.predict_action(observations(2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("variant", ["causal", "inpainting"])
def test_observations_that_are_no_numbers_do_not_decide_on_the_engine(variant: str) -> None:
    policy = apply_cache(make_policy(variant), cache_threshold=3)
    policy.predict_action({"obs": torch.full((3, 2, 20), torch.nan)})
    assert FastDiffusionPolicy.summary(policy).engine == "fused"
    assert_agree(act(policy), with_cache(remove_cache(copy.deepcopy(policy)), "eager", cache_threshold=3))


# -- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["eager", "fused"])
def test_a_cached_policy_within_torch_compile(engine: str) -> None:
    policy = apply_cache(make_policy(), cache_threshold=3, engine=engine)
    expected = act(policy)
    predict = torch.compile(lambda obs_dict: policy.predict_action(obs_dict)["action_pred"] * 1, backend="eager")
    for _ in range(2):
        torch.manual_seed(1)
        with torch.no_grad():
            found = predict(observations(3))
        assert torch.equal(found, expected)


def test_a_compiled_model_is_refused() -> None:
    policy = make_policy()
    policy.model = torch.compile(policy.model, backend="eager")
    with pytest.raises(ValueError, match=r"compiled by torch.compile.*policy.model = policy.model._orig_mod"):
        apply_cache(policy)
    policy.model = policy.model._orig_mod
    act(apply_cache(policy))


def test_a_model_that_compiled_itself_runs_eagerly() -> None:
    policy = make_policy()
    eager = with_cache(policy, "eager", cache_threshold=3)
    policy.model.compile(backend="eager")
    assert_agree(act(apply_cache(policy, cache_threshold=3)), eager)
    assert FastDiffusionPolicy.summary(policy).engine == "eager"


# -- what else is refused or left to the eager engine ----------------------------------------------------------------


def test_inputs_that_require_gradients_are_for_the_eager_engine() -> None:
    policy = apply_cache(make_policy())
    obs = observations(2)["obs"].requires_grad_()
    policy.predict_action({"obs": obs})["action"].sum().backward()
    assert obs.grad is not None
    assert obs.grad.abs().max() > 0
    assert FastDiffusionPolicy.summary(policy).engine == "eager"
    act(policy)
    assert FastDiffusionPolicy.summary(policy).engine == "fused"


def test_calls_that_cannot_be_fused_leave_nothing_behind() -> None:
    policy = apply_cache(make_policy(), cache_threshold=3)
    with_hook(policy)

    def num_tensors_after(calls: int) -> int:
        for _ in range(calls):
            act(policy)
        gc.collect()
        return sum(isinstance(found, Tensor) for found in gc.get_objects())

    assert num_tensors_after(2) == num_tensors_after(10)
    assert FastDiffusionPolicy.summary(policy).engine == "eager"


def test_cuda_graphs_need_cuda() -> None:
    with pytest.raises(ValueError, match="CUDA graphs need it on a CUDA device"):
        apply_cache(make_policy(), engine="cuda_graph")


def test_auto_is_the_default_and_says_what_it_chose() -> None:
    policy = apply_cache(make_policy(), cache_threshold=3)
    found = act(policy)
    summary = FastDiffusionPolicy.summary(policy)
    assert (summary.engine, summary.mode) == ("fused", "threshold")
    assert "chosen by 'auto'" in str(summary)
    assert "memory: buffers" in str(summary)
    assert torch.equal(found, act_with(remove_cache(policy), "fused", cache_threshold=3))


def test_original_with_a_fused_engine_is_a_lossless_mode() -> None:
    policy = make_policy()
    apply_cache(policy, cache_mode="original", engine="fused")
    summary = FastDiffusionPolicy.summary(policy)
    assert (summary.mode, summary.engine, summary.flops_fraction) == ("original", "fused", 1.0)
    apply_cache(policy, cache_mode="original")  # the plain policy, as ever
    assert FastDiffusionPolicy.summary(policy).engine is None
