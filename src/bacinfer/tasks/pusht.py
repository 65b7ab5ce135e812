"""Push-T as Diffusion Policy evaluates it (observations, initial states, score), on gym-pusht's simulator.

Policies observe either 20 numbers in pixels (0..512), nine keypoints of the T block, x0, y0, x1, y1, …, then the
pusher's x, y; or a picture and the pusher's x, y. A reward is min(coverage / 0.95, 1), the score of an episode its
highest reward.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bacinfer.tasks.episodes import Observation
from bacinfer.tasks.simulated import SimulatedTask, StateVectors
from bacinfer.tasks.video import Frame

KEYPOINTS = np.array(
    [
        [9.26978671, 90.04097352],
        [-60.98347236, -1.18672976],
        [60.91275558, -1.39336422],
        [-0.27050344, 25.54362499],
        [-14.06492758, 122.81585355],
        [39.00273850, 32.85740428],
        [-39.96641442, 32.72965545],
        [-16.82434438, 62.86317892],
        [23.54146122, -1.70028811],
    ]
)
"""The nine points in the block's frame (origin: the block's position, axes: its angle), pixels.

Diffusion Policy draws them at random with a fixed seed. They agree within 1e-6 px with the median over the 25,650
steps of the human demonstrations. Half of the steps are within 1.5e-5 px of that (the data is float32), 93 % within
0.01 px; the rest, up to 2 px, has a pose and keypoints that were recorded an instant apart.
"""

MAX_STEPS = 300
AN_INSTANT = 1e-9
VIDEO_SIZE = 384
IMAGE_SIZE = 96
"""Of the pictures that policies see."""

PUSHES = (80, 160)
"""Pixels by which a disturbance moves the block; the board has 512."""
TURN = np.pi / 2
"""Up to how many radians it turns the block, either way."""
ON_THE_BOARD = (90, 422)
"""Between which x and y (pixels) it leaves the block's centre of gravity: nothing of the block reaches into a wall."""


class PushTTask(SimulatedTask):
    """Low-dimensional Push-T."""

    name = "pusht"
    fps = 10
    description = "Push the T-shaped block onto the T-shaped target."
    state_vectors: ClassVar[StateVectors] = {"state": ("obs", slice(18, 20)), "environment_state": ("obs", slice(18))}
    disturbed_before = range(40, 140)

    def __init__(self, n_obs_steps: int = 2, max_steps: int = MAX_STEPS) -> None:
        super().__init__(n_obs_steps, max_steps)

    def simulator(self, seed: int) -> PushTSimulator:
        return PushTSimulator(seed)


class PushTImageTask(PushTTask):
    """Push-T for policies that see."""

    name = "pusht_image"
    state_vectors: ClassVar[StateVectors] = {"state": ("agent_pos", slice(2))}

    def simulator(self, seed: int) -> PushTImageSimulator:
        return PushTImageSimulator(seed)


class PushTSimulator:
    """gym-pusht's environment at the initial state of a seed."""

    def __init__(self, seed: int) -> None:
        self._env = make_env()
        self._state, _ = self._env.reset(options={"reset_to_state": initial_state(seed)})

    @property
    def observation(self) -> Observation:
        return {"obs": observation(self._state)}

    def step(self, action: NDArray[np.floating]) -> tuple[float, bool]:
        self._state, reward, solved, _, _ = self._env.step(action)
        return float(reward), bool(solved)

    def disturb(self, random: np.random.Generator) -> None:
        """Moves the block, by `PUSHES` pixels in any direction, and turns it, by up to `TURN` radians."""
        direction, distance, turn = random.uniform((-np.pi, PUSHES[0], -TURN), (np.pi, PUSHES[1], TURN))
        block = self._env.block
        block.angle += turn  # about its centre of gravity
        centre = np.array(block.local_to_world(block.center_of_gravity))
        moved = np.clip(centre + distance * np.array([np.cos(direction), np.sin(direction)]), *ON_THE_BOARD)
        block.position += tuple(moved - centre)

    def render(self) -> Frame:
        """With a cross where the last action wants the pusher."""
        return self._env.render()

    def camera(self, size: int) -> Frame:
        """What policies see in gym-pusht's own observations of pixels."""
        self._env.observation_width = self._env.observation_height = size
        return self._env._render()


class PushTImageSimulator(PushTSimulator):
    """The same, seen by a camera: a picture [3, IMAGE_SIZE, IMAGE_SIZE], 0 to 1, and the pusher's x, y in pixels."""

    @property
    def observation(self) -> Observation:
        picture = self.camera(IMAGE_SIZE).transpose(2, 0, 1)
        return {"image": picture.astype(np.float32) / 255, "agent_pos": self._state[:2]}


def make_env() -> Any:
    """gym-pusht's environment, which reports the pusher's and the block's pose.

    Raises:
        RuntimeError: gym-pusht is not installed.
    """
    try:
        from gym_pusht.envs import PushTEnv
    except ImportError as error:
        raise RuntimeError("Push-T rollouts need gym-pusht: pip install 'bacinfer[sim]'") from error
    return PushTEnv(obs_type="state", visualization_width=VIDEO_SIZE, visualization_height=VIDEO_SIZE)


def draw_state(env: Any, state: NDArray[np.floating]) -> Frame:
    """What gym-pusht's own observation of pixels shows in a state (pusher x, y, block x, y, block angle)."""
    *positions, angle = map(float, state)
    env.agent.position, env.agent.velocity = positions[:2], (0, 0)
    env.block.angle = angle  # first: it turns the block about its centre of gravity
    env.block.position, env.block.velocity, env.block.angular_velocity = positions[2:], (0, 0), 0
    env.space.step(AN_INSTANT)  # finds the contacts, which are drawn
    return env._render()


def initial_state(seed: int) -> NDArray[np.float64]:
    """Pusher x, y, block x, y (pixels), block angle (radians) of a seed, as in Diffusion Policy's environment.

    The environment sets the block's position, then its angle; the second turns the block about its centre of
    gravity, so the block does not end up at the position drawn here.
    """
    random = np.random.RandomState(seed)  # the generator of the published scores
    pusher = random.randint(50, 450), random.randint(50, 450)
    block = random.randint(100, 400), random.randint(100, 400)
    return np.array([*pusher, *block, random.randn() * 2 * np.pi - np.pi], dtype=np.float64)


def observation(state: NDArray[np.floating]) -> NDArray[np.float64]:
    """States [..., 5] (pusher x, y, block x, y, block angle) to observations [..., 20]."""
    state = np.asarray(state, dtype=np.float64)
    cos, sin = np.cos(state[..., 4]), np.sin(state[..., 4])
    rotation = np.stack([np.stack([cos, sin], -1), np.stack([-sin, cos], -1)], -2)  # for row vectors
    keypoints = KEYPOINTS @ rotation + state[..., None, 2:4]
    return np.concatenate([keypoints.reshape(*state.shape[:-1], -1), state[..., :2]], axis=-1)
