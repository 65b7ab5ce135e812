"""Latency, FLOPs, action error and statistics, against what is known by hand."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from bacinfer.core.diffusion_cache_wrapper import FastDiffusionPolicy
from bacinfer.measurement.action_error import normalised_actions, rms_difference
from bacinfer.measurement.flops import count_flops
from bacinfer.measurement.latency import Latency, actions_per_second, divided, measure_latency
from bacinfer.measurement.memory import peak_memory
from bacinfer.measurement.statistics import (
    estimate_mean,
    estimate_paired_difference,
    estimate_proportion,
    estimate_score,
)
from helpers import TinyPolicy, encoder_model
from tiny_policies import K, tiny_config

OBS = {"obs": torch.full((1, 2, 20), 250.0)}


# -- FLOPs -------------------------------------------------------------------------------------------------------


def decoder_flops() -> dict[str, int]:
    """One forward of the tiny model at batch size 1 by hand: 2 per multiply-add of every matrix product."""
    model = tiny_config().policy.model
    T, D, layers = model.horizon, model.n_emb, model.n_layer
    S = 1 + model.n_obs_steps
    return {
        "sa_block": 2 * layers * (T * D * 3 * D + 2 * T * T * D + T * D * D),
        "mha_block": 2 * layers * (T * D * D + S * D * 2 * D + 2 * T * S * D + T * D * D),
        "ff_block": 2 * layers * (2 * T * D * 4 * D),
        "rest": 2 * (T * 2 * D + 2 * 20 * D + S * 2 * D * 4 * D + T * D * 2),
    }


def test_flops_of_the_plain_policy(pusht_policy: Any) -> None:
    assert count_flops(pusht_policy, OBS) == K * sum(decoder_flops().values())


def test_flops_of_a_cached_policy(pusht_policy: Any) -> None:
    FastDiffusionPolicy.apply_cache(pusht_policy, cache_threshold=5)
    by_hand = decoder_flops()
    rest = by_hand.pop("rest")
    assert count_flops(pusht_policy, OBS) == 2 * sum(by_hand.values()) + K * rest


def test_flops_of_fused_encoder_layers_are_seen() -> None:
    """`nn.TransformerEncoderLayer` in eval mode runs one fused kernel, whose FLOPs no counter sees."""
    policy = TinyPolicy(encoder_model(num_layers=3))
    D, T = 16, 2 + 4
    layer = T * D * 3 * D + 2 * T * T * D + T * D * D + 2 * T * D * 4 * D
    assert count_flops(policy, {"obs": torch.zeros(1, 2, D)}) == policy.num_inference_steps * 3 * 2 * layer


def test_counting_leaves_the_switches_and_the_random_state(pusht_policy: Any) -> None:
    torch.backends.cuda.enable_flash_sdp(False)
    state = torch.get_rng_state()
    try:
        count_flops(pusht_policy, OBS)
        assert torch.backends.mha.get_fastpath_enabled()
        assert not torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
    assert torch.equal(torch.get_rng_state(), state)


# -- latency -----------------------------------------------------------------------------------------------------


class SlowStart:
    """Each call takes as long as the list says, in milliseconds."""

    n_action_steps = 8

    def __init__(self, milliseconds: list[float]) -> None:
        self.model = nn.Linear(1, 1)
        self.milliseconds = milliseconds

    def predict_action(self, obs_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        time.sleep(self.milliseconds.pop(0) / 1e3)
        return {}


def test_latency_leaves_out_the_warm_up() -> None:
    policy = SlowStart([200, 200, 200] + [2] * 8 + [100] * 2)
    latency = measure_latency(policy, OBS, num_calls=10)
    assert policy.milliseconds == []
    assert latency.num_calls == 10
    assert 0.002 <= latency.p50 < 0.09
    assert 0.09 < latency.p95 <= latency.p99 < 0.19


class Seeing(SlowStart):
    """Encodes for as long as the list says, denoises for 20 ms, then decodes for 3."""

    def predict_action(self, obs_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        super().predict_action(obs_dict)
        result = self.conditional_sample(obs_dict["obs"], steps=2)
        time.sleep(3e-3)
        return result

    def conditional_sample(self, obs: Tensor, *, steps: int) -> dict[str, Tensor]:
        time.sleep(steps * 10e-3)
        return {"action": obs}


def test_latency_divides_into_encoder_and_denoising() -> None:
    policy = Seeing([300, 300, 300] + [5] * 4 + [80])
    before = dict(vars(policy))
    latency = measure_latency(policy, OBS, num_calls=5)
    assert dict(vars(policy)) == before
    assert latency.encoder is not None
    assert latency.denoising is not None
    assert 0.008 <= latency.encoder < 0.05
    assert 0.020 <= latency.denoising < 0.05
    assert latency.p50 == pytest.approx(latency.encoder + latency.denoising, rel=0.5)
    assert divided(latency.encoder, latency.denoising) == f"{1e3 * latency.encoder:.1f} + {1e3 * latency.denoising:.1f}"


def test_a_loop_that_is_no_method_of_its_own_is_not_divided() -> None:
    latency = measure_latency(SlowStart([0] * 4), OBS, num_calls=1)
    assert (latency.encoder, latency.denoising) == (None, None)
    assert divided(latency.encoder, latency.denoising) == "-"


def test_actions_per_second() -> None:
    assert actions_per_second(SlowStart([]), Latency(p50=0.05, p95=1.0, p99=1.0, num_calls=3)) == pytest.approx(160)


def test_latency_of_no_calls() -> None:
    with pytest.raises(ValueError, match="at least one"):
        measure_latency(SlowStart([]), OBS, num_calls=0)


# -- memory ------------------------------------------------------------------------------------------------------


class Hungry(SlowStart):
    """Fills a tensor of so many bytes in each call."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__([])
        self.num_bytes = num_bytes

    def predict_action(self, obs_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        torch.ones(self.num_bytes, dtype=torch.uint8)
        return {}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
def test_peak_memory_is_that_of_one_call() -> None:
    little, much, little_again = (peak_memory(Hungry(n), OBS) for n in (1, 400_000_000, 1))
    assert little is not None
    assert much is not None
    assert little_again is not None
    assert 0.9 * 400e6 < much - little < 1.1 * 400e6
    assert abs(little_again - little) < 50e6


# -- action error ------------------------------------------------------------------------------------------------


def test_action_error_of_equal_policies_is_zero(pusht_policy: Any) -> None:
    observations = [OBS, {"obs": torch.full((1, 2, 20), 100.0)}]
    plain = normalised_actions(pusht_policy, observations)
    assert plain.shape == (2, 16, 2)
    assert plain.abs().max() <= 1.5  # normalised, not pixels
    assert rms_difference(plain, normalised_actions(pusht_policy, observations)).mean == 0
    assert rms_difference(plain, normalised_actions(pusht_policy, observations, noise_seed=1)).mean > 0.01
    FastDiffusionPolicy.apply_cache(pusht_policy, cache_threshold=1, engine="eager")
    assert rms_difference(plain, normalised_actions(pusht_policy, observations)).mean == 0
    FastDiffusionPolicy.apply_cache(pusht_policy, cache_threshold=5)
    assert rms_difference(plain, normalised_actions(pusht_policy, observations)).mean > 1e-4


def test_rms_difference() -> None:
    difference = rms_difference(torch.zeros(2, 2), torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    assert difference.mean == 2.5
    squares = estimate_mean([4.5, 8.0])  # an observation's mean square each
    assert squares.low is not None
    assert squares.high is not None
    assert squares.low < 0
    assert (difference.low, difference.high) == (0, pytest.approx(squares.high**0.5))
    assert rms_difference(torch.zeros(1, 2), torch.ones(1, 2)).high is None
    with pytest.raises(ValueError, match="shapes"):
        rms_difference(torch.zeros(2, 2), torch.zeros(2))


# -- statistics --------------------------------------------------------------------------------------------------

scores = st.lists(st.floats(0, 1), min_size=2, max_size=60)


@given(scores)
def test_mean_is_that_of_scipy(values: list[float]) -> None:
    estimate = estimate_mean(values)
    assert estimate.count == len(values)
    assert estimate.mean == pytest.approx(np.mean(values))
    assert estimate.standard_error == pytest.approx(stats.sem(values))
    if np.std(values) > 1e-9:
        interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert (estimate.low, estimate.high) == pytest.approx((interval.low, interval.high))


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=60))
def test_paired_difference_is_that_of_scipy(pairs: list[tuple[float, float]]) -> None:
    before, after = map(list, zip(*pairs, strict=True))
    estimate = estimate_paired_difference(before, after)
    assert estimate.mean == pytest.approx(np.mean(after) - np.mean(before), abs=1e-12)
    if np.ptp(np.subtract(after, before)) > 1e-6:
        interval = stats.ttest_rel(after, before).confidence_interval(0.95)
        assert (estimate.low, estimate.high) == pytest.approx((interval.low, interval.high))


@pytest.mark.parametrize("count", [2, 16, 50])
def test_equal_scores_leave_a_difference_open(count: int) -> None:
    """If more than `p` of all episodes differed, `count` without a difference would come up in under 5 % of cases."""
    equal = estimate_paired_difference([0.5] * count, [0.5 + 1e-9] * count)
    assert equal.mean == pytest.approx(0, abs=1e-8)
    assert equal.high is not None
    assert (1 - equal.high) ** count == pytest.approx(0.05)
    assert equal.low == pytest.approx(-equal.high, abs=1e-8)
    assert equal.high <= 3 / count

    lost = estimate_paired_difference([1.0] * count, [0.0] * count)
    assert (lost.mean, lost.low) == (-1, -1)
    assert lost.high == pytest.approx(-1 + 2 * equal.high, abs=1e-8)

    solved = estimate_score([1.0] * count)
    assert (solved.mean, solved.high) == (1, 1)
    assert solved.low == pytest.approx(1 - equal.high, abs=1e-8)
    better = estimate_score([2.0] * count)  # where a score is larger than expected
    assert better.mean == better.high == 2
    assert better.low < 2


def test_estimate_by_hand() -> None:
    estimate = estimate_mean([1.0, 2.0, 3.0])
    assert estimate.mean == 2
    assert estimate.standard_error == pytest.approx(1 / np.sqrt(3))
    assert estimate.high == pytest.approx(2 + 4.30265 / np.sqrt(3), abs=1e-4)  # t(0.975, 2)
    assert str(estimate) == "2.000 ± 0.577"


def test_too_few_values() -> None:
    single = estimate_mean([0.5])
    assert (single.mean, single.standard_error, single.low, single.high) == (0.5, None, None, None)
    assert str(single) == "0.500"
    with pytest.raises(ValueError, match="no values"):
        estimate_mean([])
    with pytest.raises(ValueError, match="shorter"):
        estimate_paired_difference([1.0, 2.0], [1.0])


@given(st.integers(1, 100), st.data())
def test_interval_of_a_proportion(count: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, count))
    estimate = estimate_proportion(successes / count, count)
    assert 0 <= estimate.low <= estimate.mean <= estimate.high <= 1
    z, p = stats.norm.ppf(0.975), successes / count  # Wilson (1927)
    centre, half = p + z**2 / (2 * count), z * np.sqrt(p * (1 - p) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    assert (estimate.low, estimate.high) == pytest.approx(((centre - half) / scale, (centre + half) / scale), abs=1e-9)


def test_what_is_no_proportion() -> None:
    with pytest.raises(ValueError, match="no share"):
        estimate_proportion(1.5, 10)
