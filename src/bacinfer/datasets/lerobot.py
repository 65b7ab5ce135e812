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

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bacinfer.datasets.episode import RecordedEpisode
from bacinfer.datasets.features import Feature
from bacinfer.datasets.lerobot_format import (
    DATA,
    EPISODES,
    INFO,
    STATS,
    TASK_COLUMN,
    TASKS,
    VIDEOS,
    DatasetFormat,
    import_parquet,
    task_table,
)
from bacinfer.datasets.video import concatenate_videos, import_av
from bacinfer.files import lock_directory, read_json, write_json

_STAGING = ".staging"


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
        self.features = dict(features)
        self._format = DatasetFormat(fps, self.features, robot_type)
        self._tasks: list[str] = []
        self._episodes: list[dict[str, Any]] = []  # the rows of meta/episodes
        self._lock = _lock(self.root)
        try:
            if (self.root / INFO).is_file():
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
        place = self._format.next_place(self._episodes)
        tasks = list(dict.fromkeys([*self._tasks, *(episode.task for episode in episodes)]))
        tables, rows = [], []
        frames_before = 0
        for number, episode in enumerate(episodes, start=self.num_episodes):
            indices = self._format.index_columns(
                episode, number, self.num_frames + frames_before, tasks.index(episode.task)
            )
            columns = {**episode.numbers, **indices}
            tables.append(self._format.frame_table(columns))
            rows.append(self._format.episode_row(episode, columns, frames_before, place))
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

        for key in self._format.cameras:
            videos = [(episode.video(key), episode.num_frames) for episode in episodes]
            concatenate_videos(videos, stage(VIDEOS.format(video_key=key, **place)), self.fps)
        pq.write_table(pa.concat_tables(tables), stage(DATA.format(**place)))
        pq.write_table(task_table(tasks), stage(TASKS))
        pq.write_table(pa.Table.from_pylist(rows, self._format.episode_schema()), stage(EPISODES.format(**place)))
        all_rows = [*self._episodes, *rows]
        write_json(stage(STATS), self._format.statistics(all_rows))
        write_json(stage(INFO), self._format.info(all_rows, tasks))
        return staged

    def _read(self) -> None:
        """Raises ValueError as the class says."""
        _, pq = import_parquet()
        info = read_json(self.root / INFO)
        expected = json.loads(json.dumps(self._format.info([], [])))
        names = ("codebase_version", "robot_type", "chunks_size", "fps")
        differing = _differences({n: info.get(n) for n in names}, {n: expected[n] for n in names})
        differing += _differences(info.get("features", {}), expected["features"])
        if differing:
            raise ValueError(f"{self.root} holds another data set: {'; '.join(differing)}. Give another directory")
        paths = sorted(self.root.glob("meta/episodes/*/*.parquet"))
        rows = [row for path in paths for row in pq.read_table(path).to_pylist()]
        if len(rows) < info["total_episodes"]:
            raise ValueError(
                f"{self.root} is damaged: {INFO} counts {info['total_episodes']} episodes, meta/episodes {len(rows)}"
            )
        self._episodes = rows[: info["total_episodes"]]
        tasks = pq.read_table(self.root / TASKS).sort_by("task_index")
        self._tasks = tasks[TASK_COLUMN].to_pylist()[: info["total_tasks"]]


def _differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} {found.get(name)} instead of {expected.get(name)}"
        for name in {**expected, **found}
        if found.get(name) != expected.get(name)
    ]


def _lock(root: Path) -> int:
    """Makes and locks the directory; the lock goes with the descriptor returned, or with the process."""
    root.mkdir(parents=True, exist_ok=True)
    lock = lock_directory(root, wait=False)
    if lock is None:
        raise RuntimeError(f"another process writes to {root}: wait for it, or give another directory")
    return lock
