"""An episode as it is recorded, and as it waits to be added to a data set."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bacinfer.datasets.features import Feature
from bacinfer.datasets.video import CameraEncoder
from bacinfer.files import read_arrays, write_arrays

_NUMBERS, _HISTOGRAM = "numbers.npz", "histogram of "


class EpisodeRecorder:
    """Collects the frames of one episode in `directory`, from where `LeRobotDatasetWriter.commit` takes them.

    A context manager: the episode is complete when it ends, and deleted if an exception ends it. It may run in any
    process.
    """

    def __init__(self, directory: Path, fps: int, features: Mapping[str, Feature], task: str) -> None:
        self._directory = directory
        self._features = features
        self._task = task
        self._values: dict[str, list[NDArray[Any]]] = {key: [] for key, f in features.items() if not f.is_video}
        directory.mkdir()
        self._cameras = {
            key: CameraEncoder(_video(directory, key), fps, *feature.shape[:2])
            for key, feature in features.items()
            if feature.is_video
        }
        self._num_frames = 0

    def add_frame(self, frame: Mapping[str, Any]) -> None:
        """Adds a frame: for each feature an array of its shape (or a plain number where that is ``(1,)``).

        Raises:
            ValueError: a feature is missing, unknown, or of another type or shape.
        """
        if frame.keys() != self._features.keys():
            raise ValueError(f"a frame has {sorted(frame)}, expected {sorted(self._features)}")
        values = {key: feature.array(key, frame[key]) for key, feature in self._features.items()}
        for key, value in values.items():
            if key in self._cameras:
                self._cameras[key].append(value)
            else:
                self._values[key].append(value)
        self._num_frames += 1

    def __enter__(self) -> EpisodeRecorder:
        return self

    def __exit__(self, exception: type[BaseException] | None, *_: object) -> None:
        """Raises ValueError if the episode has no frames."""
        for camera in self._cameras.values():
            camera.finish()
        if exception is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            return
        if not self._num_frames:
            raise ValueError(f"the episode in {self._directory} has no frames")
        numbers = {key: np.stack(values) for key, values in self._values.items()}
        histograms = {f"{_HISTOGRAM}{key}": camera.histogram for key, camera in self._cameras.items()}
        metadata = {"task": self._task, "num_frames": self._num_frames}
        write_arrays(self._directory / _NUMBERS, {**numbers, **histograms}, metadata)


@dataclass(frozen=True, eq=False)
class RecordedEpisode:
    """What an `EpisodeRecorder` left in `directory`.

    Attributes:
        numbers: the values of each feature that is no camera, [num_frames, n].
        histograms: how often each pixel value occurs, [3, 256] for each camera.
    """

    directory: Path
    task: str
    num_frames: int
    numbers: Mapping[str, NDArray[Any]]
    histograms: Mapping[str, NDArray[np.int64]]

    @classmethod
    def read(cls, directory: Path) -> RecordedEpisode:
        """Raises FileNotFoundError if the episode there is not complete."""
        arrays, metadata = read_arrays(directory / _NUMBERS)
        return cls(
            directory,
            metadata["task"],
            metadata["num_frames"],
            {key: values for key, values in arrays.items() if not key.startswith(_HISTOGRAM)},
            {key.removeprefix(_HISTOGRAM): values for key, values in arrays.items() if key.startswith(_HISTOGRAM)},
        )

    def video(self, camera: str) -> Path:
        return _video(self.directory, camera)


def _video(directory: Path, camera: str) -> Path:
    return directory / f"{camera}.mp4"
