"""A program and its buffers as they are built, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bacinfer.core.engines.fused.buffers import Buffers
from bacinfer.core.engines.fused.native import NativeProgram
from bacinfer.core.engines.fused.program import Program
from bacinfer.core.engines.sampling_call import SamplingCall
from core.fused.fused_helpers import make_constants, make_policy

BATCH, OBSERVED = 3, 2  # observations in a condition


def make_call(policy: Any) -> SamplingCall:
    given = torch.zeros(BATCH, policy.horizon, policy.action_dim)
    condition = torch.zeros(BATCH, OBSERVED, policy.obs_dim)
    return SamplingCall(given, torch.zeros_like(given, dtype=torch.bool), condition, None, {})


@pytest.mark.parametrize(
    ("overrides", "num_steps", "shape"),
    [
        ([], None, (BATCH, OBSERVED)),  # each token by itself: those of the observations
        (["policy.model.n_cond_layers=1"], 5, (5, BATCH, 1 + OBSERVED)),  # an encoder mixes them: at updating steps
    ],
)
def test_buffers_are_complete_when_they_are_made(
    overrides: list[str], num_steps: int | None, shape: tuple[int, ...]
) -> None:
    policy = make_policy("causal", *overrides)
    constants = make_constants(policy, update_every=2)
    assert len(constants.encoded_steps) == (num_steps or 0)
    buffers = Buffers(constants, make_call(policy))
    width = buffers.x.shape[-1]
    assert buffers.encoded.shape == (*shape, width)
    crossing = [number for number, block in enumerate(constants.denoiser.blocks) if block.kind == "mha_block"]
    assert list(buffers.conditions) == crossing
    program = Program(constants, make_call(policy))
    assert vars(program.buffers).keys() == vars(buffers).keys()
    assert program.buffers.encoded.shape == buffers.encoded.shape
    assert program.buffer_bytes == buffers.num_bytes


def test_the_memory_of_compiled_code_is_counted_with_its_own() -> None:
    policy = make_policy()
    program = Program(make_constants(policy), make_call(policy))
    before = program.buffer_bytes
    native = NativeProgram(program)
    assert program.buffer_bytes == before
    rows, width = program.buffers.x.shape
    assert native.buffer_bytes == before + 4 * rows * (width + 4 * width)
