"""Disturbances: once in an episode something in the simulated world is moved, when and how far is up to the seed.

They show what a method that reuses something across calls makes of a world that has just changed. A seed determines the
step before which it happens and all that is random about it, whatever the policy does: all methods are disturbed alike.
An episode that is solved before is not disturbed.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bacinfer.tasks.episodes import Simulator
from bacinfer.tasks.video import Frame

_STREAM = 2  # of a seed's random numbers


class DisturbableSimulator(Simulator, Protocol):
    """A simulator in which something can be moved."""

    def disturb(self, random: np.random.Generator) -> None:
        """Moves it by an amount drawn from `random`; always as many draws."""
        ...


class DisturbedSimulator:
    """A simulator that is disturbed before one of `steps` (counted from 0), drawn from the seed."""

    def __init__(self, simulator: DisturbableSimulator, seed: int, steps: range) -> None:
        self._simulator = simulator
        self._random = np.random.default_rng([seed, _STREAM])
        self._steps_until = int(self._random.choice(steps))

    @property
    def observation(self) -> Any:
        return self._simulator.observation

    def step(self, action: NDArray[np.floating]) -> tuple[float, bool]:
        if self._steps_until == 0:
            self._simulator.disturb(self._random)
        self._steps_until -= 1
        return self._simulator.step(action)

    def render(self) -> Frame:
        return self._simulator.render()

    def camera(self, size: int) -> Frame:
        return self._simulator.camera(size)


def check_disturbable(task: Any) -> None:
    """Raises ValueError if the task cannot be disturbed, or its episodes are too short for it."""
    steps = getattr(task, "disturbed_before", None)
    if not steps:
        raise ValueError(
            f"task {task.name} cannot be disturbed: its {type(task).__name__} cannot move anything, as the Push-T "
            "and the robot arm that bacinfer simulates itself can; leave out --disturb"
        )
    if task.max_steps < steps.stop:
        raise ValueError(
            f"task {task.name} cannot be disturbed: that happens up to step {steps.stop - 1}, but its episodes have "
            f"{task.max_steps} steps; leave out --disturb"
        )
