"""Compiled code, piece by piece: products against a loop, instructions against what their `run` computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from bacinfer.core.engines.denoising_steps import runge_kutta_steps
from bacinfer.core.engines.fused import instructions as op
from bacinfer.core.engines.fused import runners
from bacinfer.core.engines.fused.buffers import Buffers
from bacinfer.core.engines.fused.program import Program
from bacinfer.core.engines.sampling_call import SamplingCall
from core.fused.fused_helpers import make_constants, make_policy, make_scheduler
from core.fused.native_executable import NativeExecutable
from tiny_dit import CONDITION, HORIZON, MOVES, tiny_dit_policy

POLICIES = {
    "causal": [],
    "condition_encoder": [],
    "inpainting": ["policy.model.n_emb=12", "policy.model.n_head=1", "horizon=13"],
    "encoder_only": ["policy.model.n_emb=24", "policy.model.n_head=4", "horizon=19"],
}
DITS: dict[str, dict[str, Any]] = {
    "rotary": {"width": 40, "num_heads": 2},
    "plain attention": {"width": 24, "num_heads": 4, "rotary": False, "positions": False},
    "Runge-Kutta": {"width": 24, "num_heads": 2, "num_inference_steps": 8},
}
BATCH, OBSERVED = 3, 2  # observations of which a trajectory knows
ERROR = 1e-6  # of the largest value: by what sums of up to 96 products differ in another order


def test_products_of_all_shapes_equal_a_loop(native_executable: NativeExecutable) -> None:
    assert native_executable("products").startswith("0 of")


@pytest.mark.parametrize("variant", [*POLICIES, *DITS])
@torch.no_grad()
def test_every_instruction_of_a_program_computes_what_pytorch_does(variant: str) -> None:
    program = make_program(variant)
    state = tensors(program.buffers)
    for number, instruction in enumerate(program.instructions):
        before = {name: tensor.clone() for name, tensor in state.items()}
        run_natively(program, instruction)
        found = {name: tensor.clone() for name, tensor in state.items()}
        for name, tensor in state.items():
            tensor.copy_(before[name])
        program.encode_condition()
        instruction.run(program.buffers)
        if isinstance(instruction, op.CrossAttention) and instruction.time is not None:  # compiled code leaves it there
            state[f"vectors of block {instruction.block}"].copy_(found[f"vectors of block {instruction.block}"])
            state[f"offset of block {instruction.block}"].copy_(found[f"offset of block {instruction.block}"])
        for name, expected in state.items():
            finite = expected[expected.isfinite()]  # logits are not, where they are masked
            where = f"{name} after instruction {number}, {type(instruction).__name__}"
            bound = ERROR * finite.abs().amax().item()
            torch.testing.assert_close(found[name], expected, rtol=0, atol=bound, msg=lambda m, w=where: f"{w}: {m}")


def test_every_instruction_is_in_one_of_these_programs() -> None:
    found = {type(instruction) for variant in (*POLICIES, *DITS) for instruction in make_program(variant).instructions}
    assert found == {kind for kind in vars(op).values() if is_dataclass(kind) and kind.__module__ == op.__name__}


@pytest.mark.parametrize(("width", "batch", "expected"), [(16, 1, 1), (16, 3, 3), (48, 1, 2), (48, 3, 4), (96, 1, 4)])
@torch.no_grad()
def test_there_are_no_more_threads_than_the_work_is_enough_for(
    width: int, batch: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy("causal", f"policy.model.n_emb={width}", "policy.model.n_head=1", "horizon=16")
    given = torch.zeros(batch, 16, policy.action_dim)
    condition = torch.zeros(batch, OBSERVED, policy.obs_dim)
    call = SamplingCall(given, torch.zeros_like(given, dtype=torch.bool), condition, None, {})
    program = runners.NativeProgram(Program(make_constants(policy), call))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert program.num_threads == expected


@torch.no_grad()
def make_program(variant: str) -> Program:
    """A program with every instruction that the policy can have, and something in each of its buffers."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if variant in DITS:
        dit = tiny_dit_policy(make_scheduler(), **DITS[variant])
        given = draw(BATCH, HORIZON, MOVES)
        call = SamplingCall(given, torch.zeros_like(given, dtype=torch.bool), draw(BATCH, CONDITION), generator, {})
        steps = runge_kutta_steps(torch.linspace(0, 1, 3)) if variant == "Runge-Kutta" else None
        return _loaded(Program(make_constants(dit, update_every=3, sampler=steps), call), call, draw)
    policy = make_policy(variant, *POLICIES[variant])
    given = draw(BATCH, policy.horizon, policy.action_dim + (0 if policy.obs_as_cond else policy.obs_dim))
    is_given = torch.zeros_like(given, dtype=torch.bool)
    is_given[:, :OBSERVED, policy.action_dim :] = True
    condition = draw(BATCH, OBSERVED, policy.obs_dim) if policy.obs_as_cond else None
    call = SamplingCall(given, is_given, condition, generator, {})
    return _loaded(Program(make_constants(policy, update_every=3), call), call, draw)


def _loaded(program: Program, call: SamplingCall, draw: Callable[..., Tensor]) -> Program:
    program.load(call)
    buffers = program.buffers
    for buffer in (buffers.residuals, buffers.total, buffers.x, buffers.output, buffers.modulation):
        if buffer is not None:
            buffer.copy_(draw(*buffer.shape))
    return program


def run_natively(program: Program, instruction: op.Instruction) -> None:
    alone = copy.copy(program)
    alone.instructions = [instruction]
    runners.NativeProgram(alone).run()


def tensors(buffers: Buffers) -> dict[str, Tensor]:
    """All that instructions write, and `run` not for itself alone."""
    found = {name: value for name, value in vars(buffers).items() if isinstance(value, Tensor)}
    for block, condition in buffers.conditions.items():
        found |= {f"{name} of block {block}": getattr(condition, name) for name in ("vectors", "offset")}
    return {name: tensor for name, tensor in found.items() if name not in ("is_given", "mask", "x0") and tensor.numel()}
