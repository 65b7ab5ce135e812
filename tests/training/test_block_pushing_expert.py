"""The expert of block pushing, on a table without physics, and what is recorded of it in the real environment."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bacinfer.training import block_pushing_demonstrations
from bacinfer.training.block_pushing_demonstrations import record_block_pushing
from bacinfer.training.block_pushing_expert import CLEAR, MAX_STEP, expert_action
from bacinfer.training.block_pushing_table import TOUCHES, move


def observation(seed: int) -> NDArray[np.float64]:
    random = np.random.default_rng(seed)
    obs = np.zeros(16)
    obs[0:2], obs[3:5] = random.uniform([0.3, -0.35], [0.4, -0.05]), random.uniform([0.45, -0.35], [0.5, -0.05])
    obs[6:8] = 0.3, -0.4
    obs[10:12], obs[13:15] = (0.28, 0.2), (0.52, 0.2)
    return obs


def away(obs: NDArray[np.float64]) -> list[float]:
    """Of each block from the nearer square."""
    squares = obs[10:12], obs[13:15]
    return [min(float(np.linalg.norm(block - square)) for square in squares) for block in (obs[0:2], obs[3:5])]


def test_it_solves_the_nearer_block_first() -> None:
    for seed in range(20):
        obs, entered = observation(seed), list[int]()
        from_effector = [np.linalg.norm(block - obs[6:8]) for block in (obs[0:2], obs[3:5])]
        for _ in range(150):
            action = expert_action(obs)
            assert np.linalg.norm(action) <= MAX_STEP + 1e-9
            move(obs, action)
            entered += [block for block in (0, 1) if away(obs)[block] < 0.05 and block not in entered]
        assert entered == list(np.argsort(from_effector)), seed
        np.testing.assert_array_equal(expert_action(obs), 0)  # nothing is left to do


@pytest.mark.parametrize(("blocks", "squares"), [((0.3, 0.5), (10, 13)), ((0.5, 0.3), (13, 10))])
def test_the_squares_are_those_of_the_shortest_ways(blocks: tuple[float, float], squares: tuple[int, int]) -> None:
    obs = observation(0)
    obs[0:2], obs[3:5] = ((x, -0.2) for x in blocks)
    for _ in range(150):
        move(obs, expert_action(obs))
    for block, square in zip((0, 3), squares, strict=True):
        assert np.linalg.norm(obs[block : block + 2] - obs[square : square + 2]) < 0.05


def test_the_names_of_blocks_and_squares_do_not_matter() -> None:
    obs = observation(3)
    for renamed in block_pushing_demonstrations._exchanged(obs[None]):
        np.testing.assert_allclose(expert_action(renamed[0]), expert_action(obs))


def test_it_goes_around_a_block_in_its_way() -> None:
    obs = observation(0)
    obs[0:2], obs[3:5] = (0.4, 0.0), (0.55, -0.2)
    obs[6:8] = 0.4, 0.1  # between the block and its square: it has to get behind it
    way = (obs[10:12] - obs[0:2]) / np.linalg.norm(obs[10:12] - obs[0:2])
    for _ in range(15):
        obs[6:8] += expert_action(obs)
        from_block = obs[6:8] - obs[0:2]
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
