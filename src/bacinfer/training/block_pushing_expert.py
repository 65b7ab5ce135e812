"""A scripted expert of block pushing: two blocks into two squares.

Its actions are a function of what is observed: it has no phases, remembers nothing and waits for nothing, so that a
policy can learn it from observations, and it recovers from wherever a disturbance leaves the blocks and the effector.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
"""A position or displacement [2] on the table, metres."""

MAX_STEP = 0.03  # metres that the effector's target moves in a step, at most
SOLVED = 0.035  # from a block to its square; the environment asks for 0.05
BEHIND = 0.05  # where the effector comes to push from: this far from the block's centre, away from the square
PUSH = 0.01  # where it aims while pushing: inside the block, which stays ahead of it
NEAR = 0.05  # how near it has to be for that
CLEAR = 0.045  # distance that the effector keeps to blocks that it goes around
LOOK_AHEAD = 0.06


def expert_action(obs: Vector) -> Vector:
    """The displacement [2] of the effector's target, metres, at an observation [16] of the environment's runner.

    The block nearer to the effector comes first, into the square that gives both blocks together the shortest ways.
    Going to a block and pushing it only confirm these choices; an imitator that had to remember others would end
    between the blocks, or leave a block between the squares.
    """
    blocks, squares = (obs[0:2], obs[3:5]), (obs[10:12], obs[13:15])
    effector = obs[6:8]  # where it is, not where it is sent (8:10), which would tell policies what they did last
    nearer = int(np.linalg.norm(blocks[1] - effector) < np.linalg.norm(blocks[0] - effector))
    crossed = _total_way(blocks, squares[::-1]) < _total_way(blocks, squares)
    for block in (nearer, 1 - nearer):
        to_square = squares[block ^ crossed] - blocks[block]
        if np.linalg.norm(to_square) > SOLVED:
            return _push(effector, blocks, block, _unit(to_square))
    return np.zeros(2)


def _total_way(blocks: tuple[Vector, Vector], squares: tuple[Vector, Vector]) -> float:
    return sum(float(np.linalg.norm(block - square)) for block, square in zip(blocks, squares, strict=True))


def _push(effector: Vector, blocks: tuple[Vector, Vector], pushed: int, way: Vector) -> Vector:
    """Push from behind the block, else go there; `way` is the direction to the square."""
    block = blocks[pushed]
    from_block = effector - block
    behind, beside = float(-from_block @ way), abs(float(from_block @ np.array([-way[1], way[0]])))
    if behind > 0 and np.hypot(max(behind - BEHIND, 0), beside) < NEAR:
        back = np.interp(beside, [0.004, 0.018], [PUSH, BEHIND])  # the further beside the way, the further back
        return _at_most(block - back * way - effector, MAX_STEP)
    return _go(effector, block - BEHIND * way, blocks)


def _go(effector: Vector, goal: Vector, blocks: tuple[Vector, Vector]) -> Vector:
    """A step straight to the goal, or around the nearest block that is in the way."""
    step = _at_most(goal - effector, MAX_STEP)
    ahead = _unit(step)
    for block in sorted(blocks, key=lambda block: float(np.linalg.norm(block - effector))):
        from_block = effector - block
        distance = float(np.linalg.norm(from_block))
        until_nearest = float(np.clip(-from_block @ ahead, 0, np.linalg.norm(goal - effector)))
        passes_at = np.linalg.norm(from_block + min(until_nearest, LOOK_AHEAD) * ahead)
        if until_nearest > 0 and passes_at < CLEAR - 0.002 and distance < 0.10:
            return _around(from_block, distance, ahead, float(np.linalg.norm(step)))
    return step


def _around(from_block: Vector, distance: float, ahead: Vector, length: float) -> Vector:
    """A step along the tangent of the circle to keep clear of, on the side on which the straight way passes."""
    outwards = from_block / distance
    if distance <= CLEAR:
        tangent = np.array([-outwards[1], outwards[0]])
        tangent *= np.sign(tangent @ ahead) or 1.0
        leave = min(1.0, (CLEAR - distance) / 0.01 + 0.15)
        return 0.015 * _unit(0.7 * tangent + leave * outwards)
    side = np.sign(ahead[0] * from_block[1] - ahead[1] * from_block[0]) or 1.0
    angle = side * np.arcsin(CLEAR / distance)
    cos, sin = np.cos(angle), np.sin(angle)
    return max(length, 0.008) * np.array([[cos, -sin], [sin, cos]]) @ -outwards


def _unit(vector: Vector) -> Vector:
    return vector / max(float(np.linalg.norm(vector)), 1e-9)


def _at_most(vector: Vector, length: float) -> Vector:
    norm = float(np.linalg.norm(vector))
    return vector if norm <= length else vector * (length / norm)
