"""What a data set holds of a rollout: each environment step with what was observed, the action and what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bacinfer.datasets.episode import EpisodeRecorder
from bacinfer.datasets.features import Feature
from bacinfer.tasks.episodes import Recorder, State

CAMERA = "observation.image"


def frame_features(obs_dim: int, action_dim: int, robot_state: slice, image_size: int) -> dict[str, Feature]:
    """The features of the data set of a task."""
    state_dim = len(range(*robot_state.indices(obs_dim)))
    return {
        CAMERA: Feature.camera(image_size, image_size),
        "observation.state": Feature("float32", (state_dim,)),
        "observation.environment_state": Feature("float32", (obs_dim - state_dim,)),
        "action": Feature("float32", (action_dim,)),
        "next.reward": Feature("float32", (1,)),
        "next.done": Feature("bool", (1,)),
        "next.success": Feature("bool", (1,)),
    }


@dataclass(frozen=True)
class EpisodeRecording:
    """Records the episode of each seed into a directory of its own; see `SimulatedTask.rollout`."""

    directory: Path
    fps: int
    features: Mapping[str, Feature]
    task: str
    robot_state: slice

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
        observation = np.asarray(state.observation)
        return {
            CAMERA: state.camera(self.features[CAMERA].shape[0]),
            "observation.state": observation[self.robot_state],
            "observation.environment_state": np.delete(observation, self.robot_state),
        }
