"""Demonstrations of Meta-World's scripted experts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tqdm import tqdm

from bacinfer import assets
from bacinfer.tasks.base import FIRST_TEST_SEED
from bacinfer.tasks.metaworld import MAX_STEPS, MetaWorldSimulator, scripted_expert

ACTION_NOISE = 0.2
"""Standard deviation of what is added to the hand's displacements as they are executed, where 1 is a centimetre."""


def record_demonstrations(path: str | Path, env_name: str, count: int) -> None:
    """Write `count` successful episodes of a task's scripted expert, from the training seeds 0, 1, …, to an ``.npz`` file.

    The expert's hand is disturbed by a little noise, and what is recorded is its own, undisturbed action: the
    demonstrations show how to recover. Equal arguments give equal episodes.

    Raises:
        RuntimeError: the expert fails too often.
    """
    expert = scripted_expert(env_name)
    obs: list[np.ndarray] = []
    actions: list[np.ndarray] = []
    seeds: list[int] = []
    ends: list[int] = []
    with tqdm(total=count, desc=f"{env_name} demonstrations", unit="episode") as bar:
        for seed in range(min(2 * count, FIRST_TEST_SEED)):
            episode = _episode(env_name, seed, expert)
            if episode is None:
                continue
            obs.append(episode[0])
            actions.append(episode[1])
            seeds.append(seed)
            ends.append((ends[-1] if ends else 0) + len(episode[0]))
            bar.update()
            if len(seeds) == count:
                break
    if len(seeds) < count:
        raise RuntimeError(f"the scripted expert of {env_name} solved {len(seeds)} of {2 * count} episodes")
    with assets.atomic_write(path) as temporary:
        np.savez_compressed(
            temporary, obs=np.concatenate(obs), action=np.concatenate(actions), episode_ends=ends, seeds=seeds
        )


def _episode(env_name: str, seed: int, expert: object) -> tuple[np.ndarray, np.ndarray] | None:
    """Observations and the expert's actions up to the step that solves the task; None if none does."""
    random = np.random.default_rng(seed)
    simulator = MetaWorldSimulator(env_name, seed)
    obs, actions = [], []
    for _ in range(MAX_STEPS):
        obs.append(simulator.observation)
        actions.append(simulator.expert_action(expert))
        disturbance = ACTION_NOISE * random.standard_normal(3)
        _, solved = simulator.step(actions[-1] + [*disturbance, 0.0])
        if solved:
            return np.array(obs, np.float32), np.array(actions, np.float32)
    return None
