"""A task without a simulator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from helpers import observation

NUM_STEPS = 10  # K of the policies in these tests


class FakeTask:
    """Observations for `TinyPolicy` that depend on the demo and on when in the episode; counts the demos asked for."""

    name = "fake"

    def __init__(self) -> None:
        self.demos: list[int] = []

    def observations(self, policy: Any, demo_idx: int, count: int = 1) -> Iterator[dict[str, Tensor]]:
        self.demos.append(demo_idx)
        return iter([observation(batch=1, seed=1000 * demo_idx + n) for n in range(count)])
