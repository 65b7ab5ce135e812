"""What block pushing's expert does from anywhere on the table, in steps that are computed without a simulator.

A policy that errs sees what no demonstration shows. The expert's first action at such a place is exact. Where blocks
are after it is a guess: the effector pushes them straight ahead of it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bacinfer.training.block_pushing_expert import Vector, expert_action

STEPS = 4
"""Of a segment: a chunk of the policy that learns from it."""

TOUCHES = 0.026  # metres between a block's centre and the effector's, where they touch
APART = 0.04  # between two blocks' centres, at least
TABLE = (0.14, -0.5), (0.67, 0.48)  # where the effector can be: the lowest and the highest x, y
SPREADS = (0.01, 0.03, 0.08)  # by which blocks are moved, standard deviations
NEAR = 0.06  # from a block or a square, standard deviation
ASTRAY = (0.005, 0.015, 0.04)  # of an effector that left the way


def imagined(
    obs: NDArray[np.float64], segments: int, random: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Observations [segments * STEPS, 16] and the expert's actions [segments * STEPS, 2], from variations of `obs`."""
    seen: list[Vector] = []
    actions: list[Vector] = []
    while len(seen) < segments * STEPS:
        state = _elsewhere(obs[random.integers(len(obs))], random)
        if state is None:
            continue
        for _ in range(STEPS):
            action = expert_action(state)
            seen.append(state.copy())
            actions.append(action)
            move(state, action)
    return np.array(seen), np.array(actions)


def move(obs: Vector, action: Vector) -> None:
    """Move the effector, which pushes the blocks straight ahead of it; changes `obs`."""
    obs[6:8] += action
    obs[8:10] = obs[6:8]
    for block in (obs[0:2], obs[3:5]):
        apart = block - obs[6:8]
        if (distance := float(np.linalg.norm(apart))) < TOUCHES:
            block += apart / max(distance, 1e-9) * (TOUCHES - distance)


def _elsewhere(obs: Vector, random: np.random.Generator) -> Vector | None:
    """An observation with the effector, and often a block, in another place; None if they would overlap there."""
    state = obs.copy()
    blocks, squares = (state[0:2], state[3:5]), (state[10:12], state[13:15])
    if random.random() < 0.35:
        for block in blocks:
            block += random.choice(SPREADS) * random.standard_normal(2)
    if random.random() < 0.1:
        blocks[random.integers(2)][:] = squares[random.integers(2)] + NEAR * random.standard_normal(2)
    kind = random.random()
    if kind < 0.25:
        effector = random.uniform(*TABLE)
    elif kind < 0.65:
        effector = blocks[random.integers(2)] + NEAR * random.standard_normal(2)
    else:
        effector = state[6:8] + random.choice(ASTRAY) * random.standard_normal(2)
    state[6:8] = state[8:10] = effector
    overlap = min(np.linalg.norm(block - effector) for block in blocks) < TOUCHES
    return None if overlap or np.linalg.norm(blocks[0] - blocks[1]) < APART else state
