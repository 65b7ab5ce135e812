"""Demonstrations of Meta-World's scripted experts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from bacinfer import files
from bacinfer.tasks.base import FIRST_TEST_SEED
from bacinfer.tasks.metaworld import MAX_STEPS, MetaWorldSimulator, scripted_expert

NOISE = 0.2
"""Standard deviation of what is added to the hand's displacements as they are executed, where 1 is a centimetre."""

LONGEST_PREFIX = 60
PUSH = 1.5
PUSH_STEPS = 8


def record_demonstrations(path: str | Path, env_name: str, count: int, disturbed: float = 0.0) -> None:
    """Write `count` successful episodes of a task's scripted expert, from the seeds 0, 1, …, to an ``.npz`` file.

    The expert's hand is disturbed by a little noise, and what is recorded is its own, undisturbed action: the
    demonstrations show how to stay on the way. The `disturbed` part of the episodes (0..1) starts with up to 60 steps
    of hard pushes, which are not recorded: they show how to recover, from a failed grasp for instance. Equal
    arguments give equal episodes.

    Raises:
        RuntimeError: the expert fails too often.
    """
    obs: list[NDArray[np.float32]] = []
    actions: list[NDArray[np.float32]] = []
    seeds: list[int] = []
    with tqdm(total=count, desc=f"{env_name} demonstrations", unit="episode") as bar:
        for seed in range(min(2 * count, FIRST_TEST_SEED)):
            episode = _episode(env_name, seed, disturbed)
            if episode is not None:
                obs.append(episode[0])
                actions.append(episode[1])
                seeds.append(seed)
                bar.update()
            if len(seeds) == count:
                break
    if len(seeds) < count:
        raise RuntimeError(f"the scripted expert of {env_name} solved {len(seeds)} of {2 * count} episodes")
    arrays = {
        "obs": np.concatenate(obs),
        "action": np.concatenate(actions),
        "episode_ends": np.cumsum([len(episode) for episode in obs]),
        "seeds": np.array(seeds),
    }
    files.write_arrays(path, arrays, {"env_name": env_name, "count": count, "disturbed": disturbed})


def check_recorded(path: str | Path, asked: Mapping[str, Any]) -> None:
    """Raises ValueError if the file was recorded with other arguments than those `asked` for."""
    if Path(path).is_dir():  # a zarr folder, which is from elsewhere as much as a file without this metadata
        return
    recorded = files.read_arrays(path)[1]
    found = [f"{n} {recorded[n]} instead of {asked[n]}" for n in asked if n in recorded and recorded[n] != asked[n]]
    if found:
        raise ValueError(f"{path} was recorded with {', '.join(found)}: give another --data, or delete the file")


def _episode(env_name: str, seed: int, disturbed: float) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """Observations and the expert's actions up to the step that solves the task; None if none does."""
    simulator, expert = MetaWorldSimulator(env_name, seed), scripted_expert(env_name)
    pushes = np.random.default_rng([seed, 1])
    if pushes.random() < disturbed:
        for step in range(pushes.integers(LONGEST_PREFIX)):
            if step % PUSH_STEPS == 0:
                push = pushes.uniform(-PUSH, PUSH, 4)
            _, solved = simulator.step(simulator.expert_action(expert) + push)
            if solved:
                return None

    noise = np.random.default_rng(seed)
    obs, actions = [], []
    for _ in range(MAX_STEPS):
        obs.append(simulator.observation["obs"])
        actions.append(simulator.expert_action(expert))
        _, solved = simulator.step(actions[-1] + [*NOISE * noise.standard_normal(3), 0.0])
        if solved:
            return np.array(obs, np.float32), np.array(actions, np.float32)
    return None
