"""What the files of a data set in the format LeRobotDataset v3.0 hold, and where they lie."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bacinfer.datasets.episode import RecordedEpisode
from bacinfer.datasets.features import INDEX_FEATURES, Feature
from bacinfer.datasets.statistics import STATISTICS, image_statistics, merge_statistics, number_statistics
from bacinfer.datasets.video import CODEC, PIXEL_FORMAT

CODEBASE_VERSION = "v3.0"
FILES_PER_CHUNK = 1000

_FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
INFO, STATS, TASKS = "meta/info.json", "meta/stats.json", "meta/tasks.parquet"
DATA, EPISODES = f"data/{_FILE}.parquet", f"meta/episodes/{_FILE}.parquet"
VIDEOS = f"videos/{{video_key}}/{_FILE}.mp4"
TASK_COLUMN = "__index_level_0__"  # pandas' name for an index without one


@dataclass(frozen=True)
class DatasetFormat:
    """The tables and records of the data sets of one kind of frame.

    Attributes:
        features: what every frame holds besides `INDEX_FEATURES`.
    """

    fps: int
    features: Mapping[str, Feature]
    robot_type: str | None = None

    @property
    def all_features(self) -> dict[str, Feature]:
        return {**self.features, **INDEX_FEATURES}

    @property
    def cameras(self) -> list[str]:
        return [key for key, feature in self.features.items() if feature.is_video]

    def next_place(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        """Chunk and file index of the files after those of the episodes in `rows`."""
        used = -1
        if rows:
            last = rows[-1]
            kinds = ("data", "meta/episodes", *(f"videos/{key}" for key in self.cameras))
            used = max(last[f"{kind}/chunk_index"] * FILES_PER_CHUNK + last[f"{kind}/file_index"] for kind in kinds)
        chunk_index, file_index = divmod(used + 1, FILES_PER_CHUNK)
        return {"chunk_index": chunk_index, "file_index": file_index}

    def index_columns(
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

    def frame_table(self, columns: Mapping[str, NDArray[Any]]) -> Any:
        """An episode's frames, all but their pictures, from the values [frames, n] of each feature."""
        pa, _ = import_parquet()
        table = {}
        for key, feature in self.all_features.items():
            if not feature.is_video:
                flat = pa.array(columns[key].astype(feature.dtype).ravel())
                n = feature.shape[0]
                table[key] = flat if n == 1 else pa.FixedSizeListArray.from_arrays(flat, n)
        return pa.table(table)

    def episode_row(
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
        for key in self.cameras:
            row |= {f"videos/{key}/{name}": index for name, index in place.items()}
            row[f"videos/{key}/from_timestamp"] = frames_before / self.fps
            row[f"videos/{key}/to_timestamp"] = (frames_before + episode.num_frames) / self.fps
        for key, feature in self.all_features.items():
            if feature.is_video:
                statistics = image_statistics(episode.histograms[key], episode.num_frames)
            else:
                statistics = number_statistics(columns[key])
            row |= {f"stats/{key}/{name}": statistics[name].tolist() for name in STATISTICS}
        return row | {f"meta/episodes/{name}": index for name, index in place.items()}

    def episode_schema(self) -> Any:
        """The types of `episode_row`, which lerobot's tables have too."""
        pa, _ = import_parquet()
        place = {"chunk_index": pa.int64(), "file_index": pa.int64()}
        types = {"episode_index": pa.int64(), "tasks": pa.list_(pa.string()), "length": pa.int64()}
        types |= {f"data/{name}": type_ for name, type_ in place.items()}
        types |= {"dataset_from_index": pa.int64(), "dataset_to_index": pa.int64()}
        for key in self.cameras:
            times = {"from_timestamp": pa.float64(), "to_timestamp": pa.float64()}
            types |= {f"videos/{key}/{name}": type_ for name, type_ in (place | times).items()}
        for key, feature in self.all_features.items():
            extreme = pa.float64()
            if not feature.is_video and np.dtype(feature.dtype).kind != "f":
                extreme = pa.bool_() if feature.dtype == "bool" else pa.int64()
            for name in STATISTICS:
                type_ = {"min": extreme, "max": extreme, "count": pa.int64()}.get(name, pa.float64())
                for _ in range(3 if feature.is_video and name != "count" else 1):
                    type_ = pa.list_(type_)
                types[f"stats/{key}/{name}"] = type_
        return pa.schema(types | {f"meta/episodes/{name}": type_ for name, type_ in place.items()})

    def statistics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """``stats.json``: the statistics of all episodes for each feature."""
        merged = {}
        for key in self.all_features:
            episodes = {name: np.array([row[f"stats/{key}/{name}"] for row in rows]) for name in STATISTICS}
            merged[key] = {name: value.tolist() for name, value in merge_statistics(episodes).items()}
        return merged

    def info(self, rows: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> dict[str, Any]:
        """``info.json`` of a data set with these rows of ``meta/episodes``."""
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
            "data_path": DATA,
            "video_path": VIDEOS if self.cameras else None,
            "features": {key: self._feature_info(feature) for key, feature in self.all_features.items()},
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


def task_table(tasks: Sequence[str]) -> Any:
    """The tasks' indices as a pandas table, whose index are their descriptions."""
    pa, _ = import_parquet()
    columns = [
        {"name": name, "field_name": field, "pandas_type": kind, "numpy_type": dtype, "metadata": None}
        for name, field, kind, dtype in (
            ("task_index", "task_index", "int64", "int64"),
            (None, TASK_COLUMN, "unicode", "object"),
        )
    ]
    pandas = {"index_columns": [TASK_COLUMN], "column_indexes": [], "columns": columns}
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), TASK_COLUMN: pa.array(tasks, pa.string())})
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def import_parquet() -> tuple[Any, Any]:
    """The modules `pyarrow` and `pyarrow.parquet`; raises RuntimeError where they are missing."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise RuntimeError("LeRobot data sets need PyArrow: pip install 'bacinfer[lerobot]'") from error
    return pa, pq
