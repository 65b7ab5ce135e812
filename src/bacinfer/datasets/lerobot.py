"""Writes episodes in the format LeRobotDataset v3.0, as the ``lerobot`` package reads it (extra ``[lerobot]``).

::

    videos/<camera>/chunk-000/file-000.mp4      frames of the camera
    data/chunk-000/file-000.parquet             a row for each frame
    meta/tasks.parquet                          the index of each task's description
    meta/episodes/chunk-000/file-000.parquet    a row for each episode: where its frames lie, and their statistics
    meta/stats.json                             the statistics of all episodes
    meta/info.json                              features, frames per second, and how many episodes and frames count

A commit adds its episodes as new files and changes none that holds frames. Everything is written to ``.staging`` and
then moved to its place in the order above. ``info.json`` comes last: rows and frames beyond its totals do not count,
neither here nor in lerobot, so that a process killed at any moment leaves the data set of its last commit.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bacinfer.datasets.statistics import STATISTICS, image_statistics, merge_statistics, number_statistics
from bacinfer.datasets.video import (
    CODEC,
    MIN_FRAME_SIZE,
    PIXEL_FORMAT,
    CameraEncoder,
    concatenate_videos,
    import_av,
)
from bacinfer.files import read_arrays, read_json, write_arrays, write_json

CODEBASE_VERSION = "v3.0"
FILES_PER_CHUNK = 1000

_STAGING = ".staging"
_FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
_INFO, _STATS, _TASKS = "meta/info.json", "meta/stats.json", "meta/tasks.parquet"
_DATA, _EPISODES = f"data/{_FILE}.parquet", f"meta/episodes/{_FILE}.parquet"
_VIDEOS = f"videos/{{video_key}}/{_FILE}.mp4"
_NUMBERS, _HISTOGRAM = "numbers.npz", "histogram of "
_TASK_COLUMN = "__index_level_0__"  # pandas' name for an index without one


@dataclass(frozen=True)
class Feature:
    """What a frame holds under a key.

    Attributes:
        dtype: a NumPy type (``float32``, ``int64``, ``bool``), or ``video`` for a camera.
        shape: ``(n,)``; of a camera ``(height, width, 3)``.
        names: a name for each entry, if they have any.

    Raises:
        ValueError: a shape that the format or the video encoder cannot hold.
    """

    dtype: str
    shape: tuple[int, ...]
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.is_video:
            if len(self.shape) != 1 or self.shape[0] < 1:
                raise ValueError(f"a feature of numbers has a shape (n,), got {self.shape}")
        elif len(self.shape) != 3 or self.shape[2] != 3 or any(n % 2 or n < MIN_FRAME_SIZE for n in self.shape[:2]):
            raise ValueError(
                f"a camera's shape is (height, width, 3), both sides even and at least {MIN_FRAME_SIZE}, "
                f"got {self.shape}"
            )

    @classmethod
    def camera(cls, height: int, width: int) -> Feature:
        return cls("video", (height, width, 3), ("height", "width", "channels"))

    @property
    def is_video(self) -> bool:
        return self.dtype == "video"

    def array(self, key: str, value: Any) -> NDArray[Any]:
        """`value` as an array of this shape and type; raises ValueError where it is of another."""
        array = np.atleast_1d(np.asarray(value))
        dtype = np.dtype(np.uint8 if self.is_video else self.dtype)
        if array.shape != self.shape or not np.can_cast(array.dtype, dtype, "equiv" if self.is_video else "same_kind"):
            raise ValueError(f"{key}: expected {dtype} of shape {self.shape}, got {array.dtype} of shape {array.shape}")
        return array.astype(dtype)


INDEX_FEATURES = {
    "timestamp": Feature("float32", (1,)),
    "frame_index": Feature("int64", (1,)),
    "episode_index": Feature("int64", (1,)),
    "index": Feature("int64", (1,)),
    "task_index": Feature("int64", (1,)),
}
"""What the format adds to every frame: seconds and frames since the episode's start, the episode, the frame's place
among all frames, the task."""


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


class LeRobotDatasetWriter:
    """Adds episodes to the data set at `root`; a new one appears there with the first commit.

    A context manager, which keeps other writers away from the data set. `root` must not hold anything else.

    Args:
        features: what every frame holds besides `INDEX_FEATURES`. lerobot's policies know the keys
            ``observation.state``, ``observation.environment_state``, ``observation.image``,
            ``observation.images.<camera>`` and ``action``.

    Raises:
        RuntimeError: PyArrow, PyAV or its AV1 encoder is missing, or another process writes to `root`.
        ValueError: `root` holds a data set of other features, frames per second or robot, or a damaged one.
    """

    def __init__(
        self, root: str | Path, fps: int, features: Mapping[str, Feature], robot_type: str | None = None
    ) -> None:
        import_av()
        import_parquet()
        self.root = Path(root)
        self.fps = fps
        self.robot_type = robot_type
        self.features = dict(features)
        self._all_features = {**features, **INDEX_FEATURES}
        self._cameras = [key for key, feature in features.items() if feature.is_video]
        self._tasks: list[str] = []
        self._episodes: list[dict[str, Any]] = []  # the rows of meta/episodes
        self._lock = _lock(self.root)
        try:
            if (self.root / _INFO).is_file():
                self._read()
            shutil.rmtree(self.staging, ignore_errors=True)  # a killed process left it
            self.staging.mkdir()
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> LeRobotDatasetWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """Discards what was not committed, and lets other writers in."""
        shutil.rmtree(self.staging, ignore_errors=True)
        os.close(self._lock)

    @property
    def num_episodes(self) -> int:
        return len(self._episodes)

    @property
    def num_frames(self) -> int:
        return self._episodes[-1]["dataset_to_index"] if self._episodes else 0

    @property
    def staging(self) -> Path:
        """Where episodes are recorded, each in a directory of its own."""
        return self.root / _STAGING

    def commit(self, episodes: Sequence[RecordedEpisode]) -> None:
        """Adds episodes in the order given, all of them or, after an error, none; and deletes their directories.

        Raises:
            ValueError: no episodes.
            OSError: they could not be written.
        """
        if not episodes:
            raise ValueError("nothing to commit: expected at least one episode")
        place = self._next_place()
        tasks = list(dict.fromkeys([*self._tasks, *(episode.task for episode in episodes)]))
        tables, rows = [], []
        frames_before = 0
        for number, episode in enumerate(episodes, start=self.num_episodes):
            indices = self._index_columns(episode, number, self.num_frames + frames_before, tasks.index(episode.task))
            columns = {**episode.numbers, **indices}
            tables.append(self._frame_table(columns))
            rows.append(self._episode_row(episode, columns, frames_before, place))
            frames_before += episode.num_frames

        staged = self._stage(episodes, tables, rows, tasks, place)
        for target, path in staged.items():
            (self.root / target).parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, self.root / target)
        self._tasks = tasks
        self._episodes += rows
        for episode in episodes:
            shutil.rmtree(episode.directory, ignore_errors=True)

    def _stage(
        self,
        episodes: Sequence[RecordedEpisode],
        tables: Sequence[Any],
        rows: Sequence[dict[str, Any]],
        tasks: Sequence[str],
        place: Mapping[str, int],
    ) -> dict[str, Path]:
        """Writes the files of a commit; where each belongs, in the order in which they have to get there."""
        pa, pq = import_parquet()
        staged: dict[str, Path] = {}

        def stage(target: str) -> Path:
            staged[target] = self.staging / target.replace("/", "_")
            return staged[target]

        for key in self._cameras:
            videos = [(episode.video(key), episode.num_frames) for episode in episodes]
            concatenate_videos(videos, stage(_VIDEOS.format(video_key=key, **place)), self.fps)
        pq.write_table(pa.concat_tables(tables), stage(_DATA.format(**place)))
        pq.write_table(_task_table(tasks), stage(_TASKS))
        pq.write_table(pa.Table.from_pylist(rows, self._episode_schema()), stage(_EPISODES.format(**place)))
        all_rows = [*self._episodes, *rows]
        write_json(stage(_STATS), self._statistics(all_rows))
        write_json(stage(_INFO), self._info(all_rows, tasks))
        return staged

    # -- what is there already ---------------------------------------------------------------------------------

    def _read(self) -> None:
        """Raises ValueError as the class says."""
        _, pq = import_parquet()
        info = read_json(self.root / _INFO)
        expected = json.loads(json.dumps(self._info([], [])))
        names = ("codebase_version", "robot_type", "chunks_size", "fps")
        differing = _differences({n: info.get(n) for n in names}, {n: expected[n] for n in names})
        differing += _differences(info.get("features", {}), expected["features"])
        if differing:
            raise ValueError(f"{self.root} holds another data set: {'; '.join(differing)}. Give another directory")
        paths = sorted(self.root.glob("meta/episodes/*/*.parquet"))
        rows = [row for path in paths for row in pq.read_table(path).to_pylist()]
        if len(rows) < info["total_episodes"]:
            raise ValueError(
                f"{self.root} is damaged: {_INFO} counts {info['total_episodes']} episodes, meta/episodes {len(rows)}"
            )
        self._episodes = rows[: info["total_episodes"]]
        tasks = pq.read_table(self.root / _TASKS).sort_by("task_index")
        self._tasks = tasks[_TASK_COLUMN].to_pylist()[: info["total_tasks"]]

    def _next_place(self) -> dict[str, int]:
        """Chunk and file index of the next commit's files."""
        used = -1
        if self._episodes:
            last = self._episodes[-1]
            kinds = ("data", "meta/episodes", *(f"videos/{key}" for key in self._cameras))
            used = max(last[f"{kind}/chunk_index"] * FILES_PER_CHUNK + last[f"{kind}/file_index"] for kind in kinds)
        chunk_index, file_index = divmod(used + 1, FILES_PER_CHUNK)
        return {"chunk_index": chunk_index, "file_index": file_index}

    # -- contents of the files ---------------------------------------------------------------------------------

    def _index_columns(
        self, episode: RecordedEpisode, episode_index: int, first_index: int, task_index: int
    ) -> dict[str, NDArray[Any]]:
        """The values [frames, 1] of `INDEX_FEATURES`; times in double precision, as their statistics want them."""
        frames = np.arange(episode.num_frames)[:, None]
        return {
            "timestamp": frames / self.fps,
            "frame_index": frames,
            "episode_index": np.full_like(frames, episode_index),
            "index": first_index + frames,
            "task_index": np.full_like(frames, task_index),
        }

    def _frame_table(self, columns: Mapping[str, NDArray[Any]]) -> Any:
        pa, _ = import_parquet()
        table = {}
        for key, feature in self._all_features.items():
            if not feature.is_video:
                flat = pa.array(columns[key].astype(feature.dtype).ravel())
                n = feature.shape[0]
                table[key] = flat if n == 1 else pa.FixedSizeListArray.from_arrays(flat, n)
        return pa.table(table)

    def _episode_row(
        self,
        episode: RecordedEpisode,
        columns: Mapping[str, NDArray[Any]],
        frames_before: int,
        place: Mapping[str, int],
    ) -> dict[str, Any]:
        """An episode's row of ``meta/episodes``; `frames_before` it in its video file."""
        first_index = int(columns["index"][0, 0])
        row: dict[str, Any] = {
            "episode_index": int(columns["episode_index"][0, 0]),
            "tasks": [episode.task],
            "length": episode.num_frames,
            **{f"data/{name}": index for name, index in place.items()},
            "dataset_from_index": first_index,
            "dataset_to_index": first_index + episode.num_frames,
        }
        for key in self._cameras:
            row |= {f"videos/{key}/{name}": index for name, index in place.items()}
            row[f"videos/{key}/from_timestamp"] = frames_before / self.fps
            row[f"videos/{key}/to_timestamp"] = (frames_before + episode.num_frames) / self.fps
        for key, feature in self._all_features.items():
            if feature.is_video:
                statistics = image_statistics(episode.histograms[key], episode.num_frames)
            else:
                statistics = number_statistics(columns[key])
            row |= {f"stats/{key}/{name}": statistics[name].tolist() for name in STATISTICS}
        return row | {f"meta/episodes/{name}": index for name, index in place.items()}

    def _episode_schema(self) -> Any:
        """The types of `_episode_row`, which lerobot's tables have too."""
        pa, _ = import_parquet()
        place = {"chunk_index": pa.int64(), "file_index": pa.int64()}
        types = {"episode_index": pa.int64(), "tasks": pa.list_(pa.string()), "length": pa.int64()}
        types |= {f"data/{name}": type_ for name, type_ in place.items()}
        types |= {"dataset_from_index": pa.int64(), "dataset_to_index": pa.int64()}
        for key in self._cameras:
            times = {"from_timestamp": pa.float64(), "to_timestamp": pa.float64()}
            types |= {f"videos/{key}/{name}": type_ for name, type_ in (place | times).items()}
        for key, feature in self._all_features.items():
            extreme = pa.float64()
            if not feature.is_video and np.dtype(feature.dtype).kind != "f":
                extreme = pa.bool_() if feature.dtype == "bool" else pa.int64()
            for name in STATISTICS:
                type_ = {"min": extreme, "max": extreme, "count": pa.int64()}.get(name, pa.float64())
                for _ in range(3 if feature.is_video and name != "count" else 1):
                    type_ = pa.list_(type_)
                types[f"stats/{key}/{name}"] = type_
        return pa.schema(types | {f"meta/episodes/{name}": type_ for name, type_ in place.items()})

    def _statistics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """``stats.json``: the statistics of all episodes for each feature."""
        merged = {}
        for key in self._all_features:
            episodes = {name: np.array([row[f"stats/{key}/{name}"] for row in rows]) for name in STATISTICS}
            merged[key] = {name: value.tolist() for name, value in merge_statistics(episodes).items()}
        return merged

    def _info(self, rows: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> dict[str, Any]:
        return {
            "codebase_version": CODEBASE_VERSION,
            "robot_type": self.robot_type,
            "total_episodes": len(rows),
            "total_frames": rows[-1]["dataset_to_index"] if rows else 0,
            "total_tasks": len(tasks),
            "chunks_size": FILES_PER_CHUNK,
            "data_files_size_in_mb": 100,  # lerobot's defaults, for episodes that it adds itself
            "video_files_size_in_mb": 200,
            "fps": self.fps,
            "splits": {"train": f"0:{len(rows)}"},
            "data_path": _DATA,
            "video_path": _VIDEOS if self._cameras else None,
            "features": {key: self._feature_info(feature) for key, feature in self._all_features.items()},
        }

    def _feature_info(self, feature: Feature) -> dict[str, Any]:
        info: dict[str, Any] = {"dtype": feature.dtype, "shape": feature.shape, "names": feature.names}
        if feature.is_video:
            height, width, channels = feature.shape
            info["info"] = {
                "video.height": height,
                "video.width": width,
                "video.codec": CODEC,
                "video.pix_fmt": PIXEL_FORMAT,
                "video.is_depth_map": False,
                "video.fps": self.fps,
                "video.channels": channels,
                "has_audio": False,
            }
        return info


def _differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} {found.get(name)} instead of {expected.get(name)}"
        for name in {**expected, **found}
        if found.get(name) != expected.get(name)
    ]


def _video(directory: Path, camera: str) -> Path:
    return directory / f"{camera}.mp4"


def _task_table(tasks: Sequence[str]) -> Any:
    """The tasks' indices as a pandas table, whose index are their descriptions."""
    pa, _ = import_parquet()
    columns = [
        {"name": name, "field_name": field, "pandas_type": kind, "numpy_type": dtype, "metadata": None}
        for name, field, kind, dtype in (
            ("task_index", "task_index", "int64", "int64"),
            (None, _TASK_COLUMN, "unicode", "object"),
        )
    ]
    pandas = {"index_columns": [_TASK_COLUMN], "column_indexes": [], "columns": columns}
    table = pa.table(
        {"task_index": pa.array(range(len(tasks)), pa.int64()), _TASK_COLUMN: pa.array(tasks, pa.string())}
    )
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def _lock(root: Path) -> int:
    """Makes and locks the directory; the lock goes with the descriptor returned, or with the process."""
    root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise RuntimeError(f"another process writes to {root}: wait for it, or give another directory") from error
    return descriptor


def import_parquet() -> tuple[Any, Any]:
    """The modules `pyarrow` and `pyarrow.parquet`; raises RuntimeError where they are missing."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise RuntimeError("LeRobot data sets need PyArrow: pip install 'bacinfer[lerobot]'") from error
    return pa, pq
