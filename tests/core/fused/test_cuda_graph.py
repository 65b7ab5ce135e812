"""The logic of captured programs, with a stand-in for CUDA graphs; on a machine with CUDA, the real ones as well."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch

import bacinfer
from bacinfer import FastDiffusionPolicy
from bacinfer.core.engines import choose
from bacinfer.core.engines.fused import cuda_graph
from core.fused.fused_helpers import act, assert_agree, make_policy, remove_cache, with_cache
from stand_in_cuda import StandInGraph, stand_in_for_cuda
from tiny_policies import VARIANTS, observations


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[StandInGraph]:
    return stand_in_for_cuda(monkeypatch)


@pytest.mark.parametrize("variant", VARIANTS)
def test_replays_equal_the_eager_engine(variant: str, graphs: list[StandInGraph]) -> None:
    policy = make_policy(variant)
    cached, eager = (with_cache(policy, engine, cache_threshold=3) for engine in ("cuda_graph", "eager"))
    for seed in (1, 2, 3):  # other noise in the same graph
        assert_agree(act(cached, seed=seed), eager, partial(act, seed=seed))
    # that of the comparison with the plain policy, whose noise is a generator's, and its own; each with that of noise
    assert [graph.replays for graph in graphs] == [1, 0, 3, 3]


def test_other_observations_in_the_same_graph(graphs: list[StandInGraph]) -> None:
    policy = make_policy()
    cached, eager = (with_cache(policy, engine, cache_threshold=3) for engine in ("cuda_graph", "eager"))
    act(cached)

    def act_on_others(policy: Any) -> torch.Tensor:
        torch.manual_seed(4)
        with torch.no_grad():
            return policy.predict_action({"obs": 512 - observations(3)["obs"]})["action"]

    assert_agree(act_on_others(cached), eager, act_on_others)


def test_a_small_cache_of_graphs(graphs: list[StandInGraph]) -> None:
    policy = make_policy()
    cached, eager = (with_cache(policy, engine, cache_threshold=3) for engine in ("cuda_graph", "eager"))
    for batch in (1, 2, 1, 2, 3):
        assert_agree(act(cached, batch), eager, partial(act, batch=batch))
    assert len(graphs) == 2 * (1 + 3)  # one comparison, one graph and its noise a batch size
    assert FastDiffusionPolicy.summary(cached).engine == "cuda_graph"
    assert torch.equal(act(remove_cache(cached)), act(policy))


def test_an_empty_batch_needs_no_graph(graphs: list[StandInGraph]) -> None:
    policy = make_policy()
    cached = with_cache(policy, "cuda_graph", cache_threshold=3)
    assert act(cached, batch=0).shape == act(policy, batch=0).shape
    assert not graphs


def test_no_action_of_a_graph_is_finite_where_the_plain_policys_is_not(graphs: list[StandInGraph]) -> None:
    policy = make_policy()
    cached = with_cache(policy, "cuda_graph", cache_threshold=3)
    act(cached)
    for value in (1e30, math.nan):
        obs = observations(3)["obs"]
        obs[1] = value
        with torch.no_grad():
            for either in (policy, cached):
                assert not either.predict_action({"obs": obs})["action"][1].isfinite().any()


def test_kernels_that_cannot_be_compiled(
    graphs: list[StandInGraph], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(program: Any, halves: bool) -> Any:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(cuda_graph, "obstacle_to_kernels", lambda _: "")
    monkeypatch.setattr(cuda_graph, "KernelProgram", fail)
    policy = make_policy()
    cached, eager = (with_cache(policy, engine, cache_threshold=3) for engine in ("cuda_graph", "eager"))
    assert_agree(act(cached), eager)
    assert "without GPU kernels" in caplog.text
    assert "Failed to find C compiler" in caplog.text
    bacinfer.apply(policy, bacinfer.SamplingPlan(), engine="cuda_graph", precision="bf16")
    with pytest.raises(RuntimeError, match="it takes GPU kernels, and they could not be compiled: Failed to find"):
        act(policy)


def test_auto_in_half_precision_is_the_fastest_engine_on_the_device(
    graphs: list[StandInGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "fastest_on", lambda _: "cuda_graph")
    policy = bacinfer.apply(make_policy(), bacinfer.SamplingPlan(), precision="bf16")
    assert bacinfer.summary(policy).engine == "cuda_graph"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("variant", VARIANTS)
def test_on_cuda(variant: str) -> None:
    policy = make_policy(variant).cuda()
    obs = {"obs": observations(3)["obs"].cuda()}

    def act_on_cuda(policy: Any) -> torch.Tensor:
        for _ in range(2):
            torch.manual_seed(1)
            with torch.no_grad():
                result = policy.predict_action(obs)["action_pred"]
        return result

    cached, eager = (with_cache(policy, engine, cache_threshold=3) for engine in ("cuda_graph", "eager"))
    if variant.startswith("encoder_only"):  # no kernels; PyTorch's attention is coarser than its products there
        assert (act_on_cuda(cached) - act_on_cuda(eager)).abs().max() < 2e-4
    else:
        assert_agree(act_on_cuda(cached), eager, act_on_cuda)
