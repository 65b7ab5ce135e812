"""What a data set holds of a rollout: each environment step with what was observed, the action and what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bacinfer.datasets.episode import EpisodeRecorder
from bacinfer.datasets.features import Feature
from bacinfer.tasks.episodes import Observation, Recorder, State
from bacinfer.tasks.simulated import StateVectors

CAMERA = "observation.image"


def frame_features(
    state_vectors: StateVectors, observation: Observation, action_dim: int, image_size: int
) -> dict[str, Feature]:
    """The features of the data set of a task (see `SimulatedTask`), of which one observation is given."""
    vectors = recorded_vectors(state_vectors, observation)
    return {
        CAMERA: Feature.camera(image_size, image_size),
        **{name: Feature("float32", values.shape) for name, values in vectors.items()},
        "action": Feature("float32", (action_dim,)),
        "next.reward": Feature("float32", (1,)),
        "next.done": Feature("bool", (1,)),
        "next.success": Feature("bool", (1,)),
    }


def recorded_vectors(state_vectors: StateVectors, observation: Observation) -> dict[str, NDArray[np.floating]]:
    """The `SimulatedTask.state_vectors` of an observation, under LeRobot's names."""
    return {f"observation.{name}": observation[entry][part] for name, (entry, part) in state_vectors.items()}


@dataclass(frozen=True)
class EpisodeRecording:
    """Records the episode of each seed into a directory of its own; see `SimulatedTask.rollout`."""

    directory: Path
    fps: int
    features: Mapping[str, Feature]
    task: str
    state_vectors: StateVectors

    @contextmanager
    def __call__(self, seed: int) -> Iterator[Recorder]:
        with EpisodeRecorder(self.directory / str(seed), self.fps, self.features, self.task) as episode:
            before: dict[str, Any] = {}  # what was observed before the action that leads to the next state

            def record(state: State) -> None:
                nonlocal before
                if state.action is not None:
                    outcome = {
                        "action": state.action,
                        "next.reward": state.reward,
                        "next.done": state.done,
                        "next.success": state.solved,
                    }
                    episode.add_frame(before | outcome)
                if not state.done:
                    before = self._observed(state)

            yield record

    def _observed(self, state: State) -> dict[str, Any]:
        return {
            CAMERA: state.camera(self.features[CAMERA].shape[0]),
            **recorded_vectors(self.state_vectors, state.observation),
        }
