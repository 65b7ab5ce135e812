"""What the expert of block pushing does from anywhere on a table without physics."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from bacinfer.training.block_pushing_expert import expert_action
from bacinfer.training.block_pushing_table import STEPS, TOUCHES, imagined, move


def demonstrated() -> NDArray[np.float64]:
    obs = np.zeros((5, 16))
    obs[:, 0:2], obs[:, 3:5], obs[:, 6:8] = (0.35, -0.2), (0.5, -0.1), (0.3, -0.4)
    obs[:, 10:12], obs[:, 13:15] = (0.28, 0.2), (0.52, 0.2)
    return obs


def test_segments_are_the_experts() -> None:
    obs, actions = imagined(demonstrated(), 50, np.random.default_rng(0))
    assert obs.shape == (50 * STEPS, 16)
    for segment, taken in zip(obs.reshape(50, STEPS, 16), actions.reshape(50, STEPS, 2), strict=True):
        state = segment[0].copy()
        for seen, action in zip(segment, taken, strict=True):
            np.testing.assert_array_equal(seen, state)
            np.testing.assert_array_equal(action, expert_action(state))
            move(state, action)
    distances = [np.linalg.norm(obs[::STEPS, 6:8] - obs[::STEPS, place : place + 2], axis=1) for place in (0, 3)]
    assert np.min(distances) >= TOUCHES
    np.testing.assert_array_equal(obs[:, 8:10], obs[:, 6:8])
    assert np.ptp(obs[:, 6:8], axis=0).min() > 0.3  # from all over the table
    np.testing.assert_array_equal(imagined(demonstrated(), 50, np.random.default_rng(0))[0], obs)


def test_a_block_is_pushed_straight_ahead() -> None:
    obs = demonstrated()[0]
    obs[6:8] = obs[0:2] - (0, 0.03)
    move(obs, np.array([0.0, 0.01]))
    assert obs[0:2] == pytest.approx((0.35, -0.2 + 0.01 - 0.03 + TOUCHES))
    np.testing.assert_array_equal(obs[3:5], (0.5, -0.1))
