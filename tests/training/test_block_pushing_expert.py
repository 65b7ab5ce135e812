"""The expert of block pushing, on a table without physics, and what is recorded of it in the real environment."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bacinfer.training import block_pushing_demonstrations
from bacinfer.training.block_pushing_demonstrations import record_block_pushing
from bacinfer.training.block_pushing_expert import CLEAR, MAX_STEP, BlockPushingExpert

TOUCHES = 0.026  # from a block's centre to the effector's, where they touch


def observation(seed: int) -> NDArray[np.float64]:
    random = np.random.default_rng(seed)
    obs = np.zeros(16)
    obs[0:2], obs[3:5] = random.uniform([0.3, -0.35], [0.4, -0.05]), random.uniform([0.45, -0.35], [0.5, -0.05])
    obs[8:10] = 0.3, -0.4
    obs[10:12], obs[13:15] = (0.28, 0.2), (0.52, 0.2)
    return obs


def act(obs: NDArray[np.float64], action: NDArray[np.float64]) -> None:
    """Moves the effector, which pushes the blocks straight ahead of it."""
    obs[8:10] += action
    for block in (obs[0:2], obs[3:5]):
        apart = block - obs[8:10]
        if (distance := np.linalg.norm(apart)) < TOUCHES:
            block += apart / distance * (TOUCHES - distance)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("square", [0, 1])
def test_it_solves_its_order(first: int, square: int) -> None:
    for seed in range(20):
        obs, expert, entered = observation(seed), BlockPushingExpert(first, square), []
        for _ in range(150):
            action = expert.action(obs)
            assert np.linalg.norm(action) <= MAX_STEP + 1e-9
            act(obs, action)
            for block in (0, 1):
                reached = np.linalg.norm(obs[3 * block :][:2] - obs[10 + 3 * (block ^ first ^ square) :][:2]) < 0.05
                if reached and block not in entered:
                    entered.append(block)
        assert entered == [first, 1 - first], seed
        np.testing.assert_array_equal(expert.action(obs), 0)  # nothing is left to do


def test_it_goes_around_a_block_in_its_way() -> None:
    obs = observation(0)
    obs[0:2], obs[3:5] = (0.4, 0.0), (0.55, -0.2)
    obs[8:10] = 0.4, 0.1  # between the block and its square: it has to get behind it
    way = (obs[10:12] - obs[0:2]) / np.linalg.norm(obs[10:12] - obs[0:2])
    for _ in range(15):
        obs[8:10] += BlockPushingExpert(0, 0).action(obs)
        from_block = obs[8:10] - obs[0:2]
        assert np.linalg.norm(from_block) > TOUCHES
        if from_block @ way < -CLEAR:
            break
    assert from_block @ way < -CLEAR


def test_recording_needs_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusion_policy.env.block_pushing.block_pushing_multimodal", None)
    with pytest.raises(RuntimeError, match="demonstrations of block pushing need its environment"):
        record_block_pushing(tmp_path / "demonstrations.npz", 1)
    assert list(tmp_path.iterdir()) == []


def test_half_of_the_pushes_go_on() -> None:
    random, before = np.random.default_rng(0), np.array([0.0, 0.02])
    pushes = [block_pushing_demonstrations._push(random, before) for _ in range(400)]
    lengths = [np.linalg.norm(push[0]) for push in pushes]
    assert min(lengths) >= 0.005
    assert max(lengths) <= 0.03
    ahead = np.mean([push[0] @ before > 0.8 * np.linalg.norm(push[0]) * 0.02 for push in pushes])
    assert 0.45 < ahead < 0.75  # and a few of the others by chance
