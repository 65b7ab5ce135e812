"""Robot arm tasks of Meta-World: a Sawyer arm in MuJoCo, its scripted experts, and initial states drawn from seeds.

An observation is 10 numbers: position of the hand (x, y, z), opening of the gripper (0..1), then where the object and
where the goal are, seen from the hand; in metres. An action is the hand's displacement along x, y and z (1 is a
centimetre) and the effort that closes the gripper (negative: opens it), each in [-1, 1]. The task's episode ends once
it is solved: its score is 1 then and 0 otherwise, so that a mean score is a success rate.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bacinfer.tasks.episodes import Observation
from bacinfer.tasks.simulated import SimulatedTask, StateVectors
from bacinfer.tasks.video import Frame

MAX_STEPS = 200
"""A scripted expert takes about 50 (pick-place) or 90 (drawer-open)."""

DESCRIPTIONS = {"drawer-open-v3": "Open the drawer.", "pick-place-v3": "Pick up the puck and hold it at the goal."}

PUSHES = (0.03, 0.08)
"""Metres by which a disturbance moves the hand, in any horizontal direction."""

CAMERA = "corner"
VIDEO_SIZE = 384

# Meta-World's own 39 numbers: hand, gripper, object, its orientation and zeros; all of that a step ago; goal.
_HAND = slice(0, 3)
_GRIPPER = slice(3, 4)
_OBJECT = slice(4, 7)
_GOAL = slice(36, 39)


class MetaWorldTask(SimulatedTask):
    """A task of Meta-World with one object, by its name there (``drawer-open-v3``)."""

    fps = 80
    state_vectors: ClassVar[StateVectors] = {"state": ("obs", slice(4)), "environment_state": ("obs", slice(4, None))}
    disturbed_before = range(10, 40)

    def __init__(self, name: str, env_name: str, n_obs_steps: int = 2, max_steps: int = MAX_STEPS) -> None:
        super().__init__(n_obs_steps, max_steps)
        self.name = name
        self.env_name = env_name
        self.description = DESCRIPTIONS.get(env_name, env_name)

    def simulator(self, seed: int) -> MetaWorldSimulator:
        return MetaWorldSimulator(self.env_name, seed)


class MetaWorldSimulator:
    """A Meta-World environment at the initial state of a seed, which determines where object and goal are.

    Raises:
        RuntimeError: Meta-World is not installed.
        ValueError: it has no such task.
    """

    def __init__(self, env_name: str, seed: int) -> None:
        environments = _metaworld("env_dict").ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
        if f"{env_name}-goal-observable" not in environments:
            known = ", ".join(name.removesuffix("-goal-observable") for name in environments)
            raise ValueError(f"Meta-World has no task {env_name!r}; it has {known}")
        self._env = environments[f"{env_name}-goal-observable"](seed=seed)  # draws object and goal
        self._state, _ = self._env.reset()
        self._renderer: Any = None

    @property
    def observation(self) -> Observation:
        state, hand = self._state, self._state[_HAND]
        return {"obs": np.concatenate([hand, state[_GRIPPER], state[_OBJECT] - hand, state[_GOAL] - hand])}

    def step(self, action: NDArray[np.floating]) -> tuple[float, bool]:
        self._state, _, _, _, info = self._env.step(np.clip(action, -1, 1).astype(np.float32))
        return float(info["success"]), bool(info["success"])

    def disturb(self, random: np.random.Generator) -> None:
        """Pushes the hand, by `PUSHES` metres in any horizontal direction: it is there after the next steps."""
        direction, distance = random.uniform((-np.pi, PUSHES[0]), (np.pi, PUSHES[1]))
        self._env.data.mocap_pos[0, :2] += distance * np.array([np.cos(direction), np.sin(direction)])

    def render(self) -> Frame:
        """A picture from the corner of the table, drawn off-screen where there is no display.

        Raises:
            RuntimeError: there is neither a display nor an OpenGL library that draws without one.
        """
        with _drawn_without_a_display():
            try:
                if self._renderer is None:
                    self._renderer = _renderer(self._env)
                frame = self._renderer.render("rgb_array")
            except Exception as error:  # what PyOpenGL raises depends on what is missing
                raise RuntimeError(
                    f"MuJoCo cannot draw here ({error or type(error).__name__}); without a display it needs EGL "
                    "(Debian: apt-get install libegl1 libgl1) or, with MUJOCO_GL=osmesa, OSMesa (libosmesa6)"
                ) from error
        return frame[::-1, ::-1]  # Meta-World's cameras hang upside down

    def camera(self, size: int) -> Frame:
        """Raises ValueError for more pixels than `render` draws."""
        if size > VIDEO_SIZE:
            raise ValueError(f"pictures of {size} pixels asked for, Meta-World's are drawn with {VIDEO_SIZE}")
        drawn = Image.fromarray(np.ascontiguousarray(self.render()))
        return np.asarray(drawn.resize((size, size), Image.Resampling.BOX))

    def expert_action(self, expert: Any) -> NDArray[np.float64]:
        """What a scripted expert does now: [4], within [-1, 1]."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it reaches beyond [-1, 1], which is clipped
            return np.clip(expert.get_action(self._state), -1, 1).astype(np.float64)


def scripted_expert(env_name: str) -> Any:
    """Meta-World's own policy for a task, for `MetaWorldSimulator.expert_action`."""
    return _metaworld("policies").ENV_POLICY_MAP[env_name]()


def _metaworld(module: str) -> Any:
    try:
        return import_module(f"metaworld.{module}")
    except ImportError as error:
        raise RuntimeError("the robot arm needs Meta-World: pip install 'bacinfer[arm]'") from error


def _renderer(env: Any) -> Any:
    from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer

    return MujocoRenderer(env.model, env.data, width=VIDEO_SIZE, height=VIDEO_SIZE, camera_name=CAMERA)


@contextmanager
def _drawn_without_a_display() -> Iterator[None]:
    """Lets gymnasium choose EGL where there is no display, unless MUJOCO_GL says what to use."""
    if sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL"} & os.environ.keys():
        yield
        return
    os.environ["MUJOCO_GL"] = "egl"
    try:
        yield
    finally:
        del os.environ["MUJOCO_GL"]
