"""A task without a simulator of its own, for tests of what all tasks share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bacinfer.tasks.episodes import Observation
from bacinfer.tasks.simulated import SimulatedTask, StateVectors
from bacinfer.tasks.video import Frame


class WalkSimulator:
    """A point that an action moves; the reward is how far it is from its start at `seed`, and 1 or more solves it."""

    def __init__(self, seed: int, fault: str | None) -> None:
        if fault == "start":
            raise OSError("no such world")
        self._fault = fault
        self._start = float(seed)
        self._position = float(seed)
        self._steps = 0

    @property
    def observation(self) -> Observation:
        return {"obs": np.array([self._position, self._steps])}

    def step(self, action: NDArray[np.floating]) -> tuple[float, bool]:
        if self._fault == "step" and self._steps == 5:
            raise FloatingPointError("the world ended")
        if self._fault == "die" and self._steps == 5:
            os._exit(1)
        self._position += float(action[0])
        self._steps += 1
        reward = abs(self._position - self._start)
        return reward, reward >= 1

    def disturb(self, random: np.random.Generator) -> None:
        self._position += random.uniform(-0.5, 0.5)

    def render(self) -> Frame:
        return np.full((32, 48, 3), min(self._steps * 10, 255), dtype=np.uint8)

    def camera(self, size: int) -> Frame:
        return np.full((size, size, 3), min(self._steps * 5, 255), dtype=np.uint8)


class WalkTask(SimulatedTask):
    """`faults`: the episode of a seed breaks at its ``start``, at a ``step``, or its process dies (``die``)."""

    name = "walk"
    fps = 5
    description = "Walk."
    state_vectors: ClassVar[StateVectors] = {"state": ("obs", slice(1)), "environment_state": ("obs", slice(1, None))}
    disturbed_before = range(3, 20)

    def __init__(self, max_steps: int = 40, faults: Mapping[int, str] | None = None) -> None:
        super().__init__(n_obs_steps=2, max_steps=max_steps)
        self.faults = faults or {}

    def simulator(self, seed: int) -> WalkSimulator:
        return WalkSimulator(seed, self.faults.get(seed))


class NoisyPolicy:
    """Acts by chance: its actions depend on the sampling noise alone."""

    def __init__(self, scale: float = 0.05) -> None:
        self.model = nn.Linear(1, 1)
        self.scale = scale
        self.seen: list[Tensor] = []

    def predict_action(self, obs_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        self.seen.append(obs_dict["obs"])
        return {"action": self.scale * torch.randn(len(obs_dict["obs"]), 8, 1)}
