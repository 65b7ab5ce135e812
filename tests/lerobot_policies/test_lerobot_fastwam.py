"""What is FastWAM's own: a batch one entry after another, and a number of steps that is read before its loop begins."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

if importlib.util.find_spec("lerobot") is None:
    pytest.skip("needs lerobot, in an environment of its own", allow_module_level=True)

import bacinfer.lerobot
import tiny_lerobot as tiny
from bacinfer import CacheSchedule, Sampler, SamplingPlan
from bacinfer.analysis.residuals import record


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny.fastwam(tmp_path_factory.mktemp("fastwam"))


@pytest.fixture
def policy(made: Any) -> Any:
    return bacinfer.lerobot.remove(made)


def entry(observation: dict[str, Any], index: int) -> dict[str, Any]:
    return {key: value[index : index + 1] for key, value in observation.items()}


def every_second_step(policy: Any) -> CacheSchedule:
    found = bacinfer.lerobot.summary(policy)
    return CacheSchedule.periodic(found.blocks, found.num_inference_steps, 2)


def test_a_batch_is_sampled_as_its_entries_are(policy: Any) -> None:
    bacinfer.lerobot.apply(policy, every_second_step(policy))
    seen = tiny.observation(policy, batch=3)
    entries = [policy.predict_action_chunk(entry(seen, index)) for index in range(3)]
    assert torch.equal(policy.predict_action_chunk(seen), torch.cat(entries))


def test_a_recording_has_all_entries_of_a_batch(policy: Any) -> None:
    handle, seen = bacinfer.lerobot.handle(policy), tiny.observation(policy)
    found = record(handle, seen, 0).residuals
    entries = [record(handle, entry(seen, index), 0).residuals for index in range(2)]
    assert len(found) == 6
    for block, residuals in found.items():
        assert residuals.shape[:2] == (10, 2)
        assert torch.equal(residuals, torch.cat([e[block] for e in entries], dim=1))


def test_a_batch_may_name_the_plans_number_of_steps_only(policy: Any) -> None:
    seen = tiny.observation(policy)
    five = policy.predict_action_chunk({**seen, "num_inference_steps": 5})
    bacinfer.lerobot.apply(policy, SamplingPlan(sampler=Sampler("own", 5)))
    assert torch.equal(policy.predict_action_chunk(seen), five)
    assert torch.equal(policy.predict_action_chunk({**seen, "num_inference_steps": 5}), five)
    with pytest.raises(RuntimeError, match="took 4 denoising steps, but the schedule was made for K = 5"):
        policy.predict_action_chunk({**seen, "num_inference_steps": 4})


def test_a_replaced_method_is_refused(policy: Any) -> None:
    layer = policy.model.mot.layers[0]
    layer._forward_action_cached = lambda *args, **kwargs: None
    try:
        with pytest.raises(ValueError, match=r"_forward_action_cached of a layer of policy\.model\.mot was replaced"):
            bacinfer.lerobot.apply(policy, SamplingPlan())
    finally:
        del layer._forward_action_cached
