"""Robot arm tasks of Meta-World (MuJoCo): a Sawyer arm, its scripted experts, and initial states drawn from seeds.

An observation is 10 numbers: position of the hand (x, y, z), opening of the gripper (0..1), position of the object, and
position of the goal, in metres. An action is the hand's displacement along x, y, z (1 is a centimetre) and the effort that
closes the gripper (negative: opens), each in [-1, 1]. An episode ends when the task is solved; its score is 1 then and
0 otherwise, so that a mean score is a success rate.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

OBS_DIM = 10
MAX_STEPS = 200
CAMERA = "corner2"
VIDEO_SIZE = 384

_CURRENT = slice(0, 7)  # of Meta-World's 39 numbers: hand, gripper, object; then its orientation, zeros, the frame before
_GOAL = slice(36, 39)


class MetaWorldSimulator:
    """A Meta-World environment at the initial state of a seed; the seed determines object and goal."""

    def __init__(self, env_name: str, seed: int) -> None:
        self._env = _environment(env_name, seed)
        self._state, _ = self._env.reset()  # to the object and the goal that were drawn when it was made

    @property
    def observation(self) -> NDArray[np.float64]:
        """[10], see above."""
        return np.concatenate([self._state[_CURRENT], self._state[_GOAL]])

    def step(self, action: NDArray[np.floating]) -> tuple[float, bool]:
        self._state, _, _, _, info = self._env.step(np.clip(action, -1, 1).astype(np.float32))
        solved = bool(info["success"])
        return float(solved), solved

    def expert_action(self, expert: Any) -> NDArray[np.float64]:
        """What a scripted expert (`scripted_expert`) does now, within [-1, 1]."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it reaches beyond [-1, 1], which is clipped
            return np.clip(expert.get_action(self._state), -1, 1).astype(np.float64)


def scripted_expert(env_name: str) -> Any:
    """Meta-World's own policy for a task, which sees more than `MetaWorldSimulator.observation`."""
    from metaworld.policies import ENV_POLICY_MAP

    return ENV_POLICY_MAP[env_name]()


def _environment(env_name: str, seed: int) -> Any:
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE as environments

    key = f"{env_name}-goal-observable"
    return environments[key](seed=seed)
