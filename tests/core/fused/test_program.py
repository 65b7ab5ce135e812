"""A program and its buffers as they are built, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bacinfer.core.engines.fused.buffers import Buffers
from bacinfer.core.engines.fused.native import NativeProgram
from bacinfer.core.engines.fused.program import Program
from bacinfer.core.engines.sampling_call import SamplingCall
from core.fused.fused_helpers import make_constants, make_policy

BATCH, OBSERVED = 3, 2  # observations in a condition


def make_call(policy: Any, batch: int = BATCH) -> SamplingCall:
    given = torch.zeros(batch, policy.horizon, policy.action_dim)
    condition = torch.zeros(batch, OBSERVED, policy.obs_dim)
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


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="needs huge pages")
def test_what_products_read_lies_in_one_piece_of_huge_pages() -> None:
    policy = make_policy()
    constants = make_constants(policy)
    natives = [NativeProgram(Program(constants, make_call(policy, batch))) for batch in (1, BATCH)]
    width = natives[0]._library.panel_width()
    affines = [constants.input, constants.weights[0].qkv, constants.weights[2].second, constants.head]
    (storage,) = {affine.panels(width).untyped_storage().data_ptr() for affine in affines}
    assert "hg" in flags_of_mapping(storage)
    for affine in affines:
        panels = affine.panels(width)
        weight = panels[:, 1:].transpose(1, 2).reshape(-1, panels.shape[1] - 1)[: len(affine.bias)]
        assert torch.equal(weight, affine.weight)


def flags_of_mapping(address: int) -> list[str]:
    """Of the memory at an address, as the kernel names them."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            start, end = (int(side, 16) for side in first.split("-"))
            found = start <= address < end
        elif found and first == "VmFlags:":
            return rest.split()
    raise AssertionError(f"there is no memory at {address:#x}")


def test_the_memory_of_compiled_code_is_counted_with_its_own() -> None:
    policy = make_policy()
    program = Program(make_constants(policy), make_call(policy))
    before = program.buffer_bytes
    native = NativeProgram(program)
    assert program.buffer_bytes == before
    rows, width = program.buffers.x.shape
    assert native.buffer_bytes == before + 4 * rows * 4 * width
