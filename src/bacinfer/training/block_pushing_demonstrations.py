"""Demonstrations of block pushing by this project's expert, in Diffusion Policy's own environment."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from bacinfer import files
from bacinfer.policies.diffusion_policy import INSTALL_HINT
from bacinfer.training.block_pushing_expert import Vector, expert_action
from bacinfer.training.block_pushing_table import STEPS, imagined

FIRST_SEED = 20_000
"""Of the demonstrations' episodes: apart from those of training rollouts and of tests."""

MAX_STEPS = 350
NOISE = 0.0015
"""Standard deviation of what is added to every action as it is executed, metres."""

PUSH_RATE = 1 / 18
"""How often a step is the first of a push away, which is not recorded."""

IMAGINED = 400
"""Segments from anywhere, for each episode: a step of the simulator takes as long as fifty of them."""

Segment = tuple[list[Vector], list[Vector]]
"""Observations and the expert's actions at them, of steps that follow each other."""


def record_block_pushing(path: str | Path, count: int) -> None:
    """Write `count` successful episodes, and what the expert does from elsewhere, to an ``.npz`` file.

    A little noise is added to what is executed, and now and then the effector is pushed away for some steps; what is
    recorded are the expert's own actions, so that the demonstrations show how to stay on the way and how to return to
    it. A push divides an episode into segments, which the file keeps apart like episodes (``episode_ends``; ``seeds``
    has the episode of each). All of them are there four times (`_exchanged`), then `IMAGINED` short segments an
    episode from anywhere on the table (`imagined`, seed -1). Equal arguments give equal demonstrations.

    Raises:
        RuntimeError: the package diffusion_policy or its simulator is not installed; the expert fails too often.
    """
    env = make_env()
    segments: list[Segment] = []
    seeds: list[int] = []
    solved = 0
    with tqdm(total=count, desc="block pushing demonstrations", unit="episode") as bar:
        for seed in range(FIRST_SEED, FIRST_SEED + 2 * count):
            if episode := _episode(env, seed):
                segments += episode
                seeds += [seed] * len(episode)
                solved += 1
                bar.update()
            if solved == count:
                break
    if solved < count:
        raise RuntimeError(f"the scripted expert of block pushing solved {solved} of {2 * count} episodes")
    obs = np.concatenate([obs for obs, _ in segments])
    action = np.concatenate([actions for _, actions in segments])
    more_obs, more_action = imagined(obs, IMAGINED * count, np.random.default_rng(FIRST_SEED))
    copies = _exchanged(obs)
    lengths = [len(obs) for obs, _ in segments] * len(copies) + [STEPS] * (IMAGINED * count)
    arrays = {
        "obs": np.concatenate([*copies, more_obs]).astype(np.float32),
        "action": np.concatenate([*[action] * len(copies), more_action]).astype(np.float32),
        "episode_ends": np.cumsum(lengths),
        "seeds": np.array(seeds * len(copies) + [-1] * (IMAGINED * count)),
    }
    files.write_arrays(path, arrays, {"env_name": "block_pushing", "count": count})


def _exchanged(obs: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Observations as they are, and with the names of the blocks, of the squares, and of both exchanged.

    What is to be done depends on neither.
    """
    blocks, squares = [3, 4, 5, 0, 1, 2, *range(6, 16)], [*range(10), 13, 14, 15, 10, 11, 12]
    return [obs, obs[:, blocks], obs[:, squares], obs[:, blocks][:, squares]]


def make_env() -> Any:
    """Diffusion Policy's environment; raises RuntimeError where its package or simulator is not installed."""
    try:
        from diffusion_policy.env.block_pushing.block_pushing_multimodal import BlockPushMultimodal
    except ImportError as error:
        raise RuntimeError(
            f"demonstrations of block pushing need its environment, which cannot be imported ({error}). {INSTALL_HINT}"
        ) from error
    logging.getLogger().setLevel(logging.WARNING)  # the environment reports every block that moves
    return BlockPushMultimodal(control_frequency=10.0, shared_memory=False)


def _episode(env: Any, seed: int) -> list[Segment] | None:
    """The recorded segments of an episode; None if it was not solved."""
    env.seed(seed)
    obs = flat(env.reset())
    random = np.random.default_rng([seed, 7])
    segments: list[Segment] = [([], [])]
    executed, pushes = np.array([0.0, 1.0]), list[Vector]()
    for _ in range(MAX_STEPS):
        if not pushes and random.random() < PUSH_RATE:
            pushes = _push(random, executed)
            segments.append(([], []))
        if pushes:
            executed = pushes.pop()
        else:
            action = expert_action(obs)
            segments[-1][0].append(obs)
            segments[-1][1].append(action)
            executed = action + NOISE * random.standard_normal(2)
        state, _, done, _ = env.step(executed)
        obs = flat(state)
        if done:
            return [segment for segment in segments if len(segment[0]) >= 3]
    return None


def _push(random: np.random.Generator, before: Vector) -> list[Vector]:
    """Displacements of some steps, anywhere or roughly on in the direction of the step `before`."""
    steps = int(random.integers(2, 11))
    angle = random.uniform(0, 2 * np.pi)
    if random.random() < 0.5:  # an imitator's commonest mistake is to go on
        angle = np.arctan2(before[1], before[0]) + 0.4 * random.standard_normal()
    return [random.uniform(0.005, 0.03) * np.array([np.cos(angle), np.sin(angle)])] * steps


def flat(state: dict[str, NDArray[Any]]) -> Vector:
    """The environment's observation as its runner gives it to policies, [16]."""
    return np.concatenate([np.ravel(value) for value in state.values()]).astype(np.float64)
