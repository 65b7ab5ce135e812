"""`bacinfer.measure`: plans beside the plain policy, on observations alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bacinfer
from bacinfer import CacheSchedule, PolicyHandle, SamplingPlan
from bacinfer.core.blocks import find_blocks
from bacinfer.measurement.flops import count_flops
from bacinfer.measurement.plans import measure
from core.fused.fused_helpers import make_policy
from helpers import TinyPolicy, act, observation
from tiny_image_policies import image_observations, image_policy
from tiny_policies import observations as pusht_observations

OBSERVATIONS = [observation(batch=1, seed=seed) for seed in range(4)]


def periodic(policy: Any, interval: int) -> CacheSchedule:
    return CacheSchedule.periodic([block.key for block in find_blocks(policy.model)], 10, interval)


def test_errors_flops_and_latencies_are_those_of_the_plans(policy: TinyPolicy) -> None:
    def sampled(first_seed: int) -> Tensor:
        return torch.cat([act(policy, obs, seed) for seed, obs in enumerate(OBSERVATIONS, first_seed)])

    plain = sampled(0)
    flops = count_flops(policy, OBSERVATIONS[0])
    bacinfer.apply(policy, periodic(policy, 5))
    cached = sampled(0)
    flops_cached = count_flops(policy, OBSERVATIONS[0])
    bacinfer.remove(policy)
    other_noise = sampled(len(OBSERVATIONS))

    plans = {"lossless": SamplingPlan(), "every 5": SamplingPlan(periodic(policy, 5))}
    found = bacinfer.measure(policy, plans, iter(OBSERVATIONS), num_calls=2)
    assert list(found.rows) == ["plain", "lossless", "every 5"]
    assert [row.engine for row in found.rows.values()] == [None, "eager", "eager"]
    assert [row.flops for row in found.rows.values()] == [flops, flops, flops_cached]
    assert [row.latency.num_calls for row in found.rows.values()] == [2, 2, 2]
    assert [found.rows[name].action_error.mean for name in ("plain", "lossless")] == [0, 0]
    assert found.rows["every 5"].action_error.mean == pytest.approx((cached - plain).square().mean().sqrt().item())
    assert found.rows["every 5"].action_error.low is not None
    assert found.noise_error.mean == pytest.approx((other_noise - plain).square().mean().sqrt().item())
    assert found.rows["plain"].speedup == 1
    ratio = found.rows["plain"].latency.p50 / found.rows["every 5"].latency.p50
    assert found.rows["every 5"].speedup == ratio


def test_variants_are_timed_in_turn(policy: TinyPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    predict = TinyPolicy.predict_action

    def noted(self: TinyPolicy, obs: dict[str, Tensor]) -> dict[str, Tensor]:
        turns.append(bacinfer.summary(self).mode)
        return predict(self, obs)

    monkeypatch.setattr(TinyPolicy, "predict_action", noted)
    measure(policy, {"cached": periodic(policy, 5)}, OBSERVATIONS, num_calls=2)
    assert turns[-14:-4] == ["original", "plan"] * 5  # after actions and FLOPs, before the other draw of noise


def test_errors_are_in_normalised_units_where_the_policy_has_them() -> None:
    policy = make_policy()
    obs = [{"obs": row[None]} for row in pusht_observations(3)["obs"]]
    plan = periodic(policy, 5)
    found = measure(policy, {"every 5": plan}, obs, num_calls=1)
    assert "RMS difference to the plain policy's actions at equal noise, normalised units" in str(found)
    assert found.rows["every 5"].engine == "fused"
    handle = PolicyHandle(policy.model, 10, (policy, "predict_action"))
    policy.normalizer.params_dict["action"]["scale"].data *= 100  # what the policy returns is 100 times smaller
    normalised, raw = (measure(p, {"every 5": plan}, obs, num_calls=1) for p in (policy, handle))
    error = normalised.rows["every 5"].action_error.mean
    assert error == pytest.approx(found.rows["every 5"].action_error.mean, rel=1e-3)
    assert raw.rows["every 5"].action_error.mean == pytest.approx(error / 100, rel=1e-3)
    assert "in the units of the policy's actions" in str(raw)


class Renamed(nn.Module):
    """Returns a plain tensor, from a method of another name that takes no dict, and one observation at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.denoiser = TinyPolicy()

    def plan_ahead(self, observation: tuple[str, Tensor]) -> Tensor:
        words, obs = observation
        assert words == "turn left"
        assert len(obs) == 1
        return self.denoiser.predict_action({"obs": obs})["action_pred"]


def test_a_handle_is_measured_like_its_policy(policy: TinyPolicy) -> None:
    renamed = Renamed().eval()
    handle = PolicyHandle(renamed.denoiser.model, 10, (renamed, "plan_ahead"))
    plans = {"every 5": periodic(policy, 5)}
    spoken = [("turn left", obs["obs"]) for obs in OBSERVATIONS]
    a, b = (measure(p, plans, seen, num_calls=1) for p, seen in ((policy, OBSERVATIONS), (handle, spoken)))
    assert bacinfer.find_plan(handle, spoken, 3, 2).cache == bacinfer.find_plan(policy, OBSERVATIONS, 3, 2).cache
    for row, same in zip(a.rows.values(), b.rows.values(), strict=True):
        assert (row.action_error, row.flops, row.engine) == (same.action_error, same.flops, same.engine)
    assert a.noise_error == b.noise_error


@pytest.mark.parametrize("make", [TinyPolicy, make_policy])
@pytest.mark.parametrize("applied", [False, True])
def test_the_policy_is_left_exactly_as_found(make: Any, applied: bool) -> None:
    policy = make()
    obs = OBSERVATIONS if make is TinyPolicy else [{"obs": row[None]} for row in pusht_observations(3)["obs"]]
    if applied:
        bacinfer.apply(policy, periodic(policy, 3))

    def sampled() -> Tensor:
        torch.manual_seed(3)
        return policy.predict_action(obs[0])["action_pred"]

    before, attributes, keys = sampled(), dict(vars(policy)), list(policy.state_dict())
    forwards = [vars(module).get("forward") for module in policy.modules()]
    state = torch.get_rng_state()
    for plans in ({"a": periodic(policy, 5)}, {"a": SamplingPlan(), "broken": CacheSchedule(7, {})}):
        try:
            measure(policy, plans, obs, num_calls=1)
        except ValueError as error:
            assert "K = 7" in str(error)  # noqa: PT017
        assert torch.equal(torch.get_rng_state(), state)
        assert dict(vars(policy)) == attributes
        assert [vars(module).get("forward") for module in policy.modules()] == forwards
        assert list(policy.state_dict()) == keys
        assert torch.equal(sampled(), before)


def test_the_table_has_a_line_for_each_and_says_what_it_is(policy: TinyPolicy, tmp_path: Path) -> None:
    SamplingPlan(periodic(policy, 5)).save(tmp_path / "plan.json")
    found = measure(policy, {"from a file": tmp_path / "plan.json"}, OBSERVATIONS, num_calls=2)
    header, plain, row, errors, latency = str(found).splitlines()
    assert len(header) - len("engine") == len(plain) - 1 == len(row) - len("eager")
    assert plain.split()[:2] == ["plain", "-"]
    assert row.startswith("from a file ")
    estimate = found.rows["from a file"].action_error
    assert f"{estimate.mean:.4f} [{estimate.low:.4f}, {estimate.high:.4f}]" in row
    assert "95% interval over 4 observations" in errors
    assert latency == (
        "Latency: 2 calls at the first observation, taken in turn, on cpu, 1 threads; encoder: what they take before "
        "and after the denoising loop."
    )
    one = measure(policy, {}, OBSERVATIONS[:1], num_calls=1)
    assert "interval" not in str(one)


def test_how_the_calls_of_a_policy_that_sees_divide() -> None:
    policy = image_policy("pusht", "policy.crop_shape=[32,32]", "policy.num_inference_steps=4")
    obs = image_observations(batch=1)
    loop = policy.conditional_sample
    found = measure(policy, {"lossless": SamplingPlan()}, [obs], num_calls=3)
    assert policy.conditional_sample == loop
    assert found.rows["lossless"].engine == "fused"  # timing its loop hides nothing from the engine, nor it from timing
    assert found.rows["lossless"].action_error.mean < 1e-4
    for name, line in zip(found.rows, str(found).splitlines()[1:], strict=False):
        latency = found.rows[name].latency
        assert latency.encoder is not None
        assert latency.denoising is not None
        assert latency.p50 == pytest.approx(latency.encoder + latency.denoising, rel=0.5)
        assert f"{1e3 * latency.encoder:.1f} + {1e3 * latency.denoising:.1f}" in line
    plain, lossless = (row.latency for row in found.rows.values())
    assert lossless.denoising < plain.denoising
    handle = PolicyHandle(policy.model, 4, (policy, "predict_action"))
    assert measure(handle, {}, [obs], num_calls=1).rows["plain"].latency.encoder is not None


class Speaking(TinyPolicy):
    def predict_action(self, obs_dict: dict[str, Tensor]) -> Any:
        super().predict_action(obs_dict)
        return {"words": "forward"}


@pytest.mark.parametrize(
    ("make", "plans", "observations", "error", "message"),
    [
        (TinyPolicy, SamplingPlan(), OBSERVATIONS, TypeError, "a dict of names to plans, got SamplingPlan"),
        (TinyPolicy, {"plain": SamplingPlan()}, OBSERVATIONS, ValueError, "'plain' is the plain policy's name"),
        (TinyPolicy, {"a": 3}, OBSERVATIONS, TypeError, "SamplingPlan, a CacheSchedule or the path of a file, got int"),
        (TinyPolicy, {"a": "missing.json"}, OBSERVATIONS, FileNotFoundError, r"missing\.json"),
        (TinyPolicy, {}, [], ValueError, "no observations"),
        (Speaking, {}, OBSERVATIONS, TypeError, "'action_pred' or 'action', got a dict of words"),
        (nn.Module, {}, OBSERVATIONS, TypeError, "PolicyHandle"),
    ],
)
def test_what_cannot_be_measured(make: Any, plans: Any, observations: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        measure(make(), plans, observations, num_calls=1)


def test_no_calls_are_refused(policy: TinyPolicy) -> None:
    with pytest.raises(ValueError, match="expected at least one"):
        measure(policy, {}, OBSERVATIONS, num_calls=0)
