"""The one place that knows an assets directory: what lies where, in which form, and who reads it.

::

    assets/<task>/original/
        activations.npz                        residuals of one run, [K, ...] a block
        similarity_matrices.npz                a K×K matrix a block and metric, and what is needed to go on
        sensitive/<budget>.json                a schedule by what reusing residuals does to the actions
        block_errors.json                      what bubbling union selects blocks by
        optimal_steps/<metric>/schedules.json  the update steps of all blocks, for every number of updates M

All of it names blocks by their keys. Recordings and matrices made by earlier versions name modules instead, and say
which blocks those are. Where one of these files is missing, BACInfer's own are read (see `bacinfer_files`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from bacinfer import bacinfer_files
from bacinfer.files import contents, describe, read_arrays, read_json, write_arrays, write_json

SCHEDULES_FILE = "schedules.json"
JSON_VERSION = 1


@dataclass(frozen=True)
class RunAssets:
    """Paths of what was recorded and found in one cache mode of a task, ``assets/<task>/<mode>``."""

    directory: Path

    @property
    def activations(self) -> Path:
        return self.directory / "activations.npz"

    @property
    def similarity_matrices(self) -> Path:
        return self.directory / "similarity_matrices.npz"

    def sensitive_schedule(self, budget: float) -> Path:
        return self.directory / "sensitive" / f"{budget:g}.json"

    @property
    def block_errors(self) -> Path:
        return self.directory / "block_errors.json"

    def steps_dir(self, metric: str) -> Path:
        """What `apply_cache` takes as `optimal_steps_dir`."""
        return self.directory / "optimal_steps" / metric

    @classmethod
    def of_steps_dir(cls, steps_dir: str | Path) -> RunAssets:
        """The run directory that a steps directory ``<run>/optimal_steps/<metric>`` lies in."""
        return cls(Path(steps_dir).resolve().parent.parent)


# -- schedules ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredSchedule:
    """Update steps as a steps directory holds them, unchecked but for their types.

    Attributes:
        metric: The similarity that they were found with.
        num_caches: M, how many update steps each block was to have.
        num_inference_steps: K of the policy that they are of; None if that is not recorded, as in BACInfer's files.
        update_steps: Block key to its update steps.
    """

    metric: str
    num_caches: int
    num_inference_steps: int | None
    update_steps: Mapping[str, Sequence[int]]


def write_schedules(steps_dir: str | Path, schedules: Iterable[StoredSchedule]) -> Path:
    """Adds schedules to a steps directory, in place of those with the same metric and M; returns the file.

    Raises:
        ValueError: if the file is damaged.
    """
    with _changing(Path(steps_dir) / SCHEDULES_FILE) as stored:
        stored |= {(schedule.metric, schedule.num_caches): schedule for schedule in schedules}
    return Path(steps_dir) / SCHEDULES_FILE


def write_block_steps(steps_dir: str | Path, block: str, metric: str, steps: Sequence[int], K: int) -> Path:
    """Adds one block's update steps to the schedule of their metric and number; returns the file.

    Raises:
        ValueError: if the file is damaged, or that schedule is of a policy with another K.
    """
    path, key = Path(steps_dir) / SCHEDULES_FILE, (metric, len(steps))
    with _changing(path) as stored:
        schedule = stored.get(key, StoredSchedule(*key, K, {}))
        if schedule.num_inference_steps != K:
            raise ValueError(
                f"{path}: its schedule for {metric} {len(steps)} is of K = {schedule.num_inference_steps} denoising "
                f"steps, the steps of {block} are of {K}; move that file away first"
            )
        stored[key] = replace(schedule, update_steps={**schedule.update_steps, block: steps})
    return path


def read_schedule(steps_dir: str | Path, num_caches: int, metric: str) -> StoredSchedule | None:
    """The update steps of all blocks for one metric and M; None if there are none.

    Blocks that ``schedules.json`` does not have are read from BACInfer's files.

    Raises:
        ValueError: if a file is damaged or holds something else, or the blocks are of policies with different K.
    """
    path = Path(steps_dir) / SCHEDULES_FILE
    stored = _read_schedules(path).get((metric, num_caches))
    update_steps = dict(stored.update_steps) if stored else {}
    made_for = {stored.num_inference_steps} if stored else set()
    for block, file in bacinfer_files.steps_files(steps_dir, num_caches, metric).items():
        if block not in update_steps:
            update_steps[block], recorded = bacinfer_files.read_steps(file)
            made_for.add(recorded)
    if not update_steps:
        return None
    num_steps = sorted(K for K in made_for if K is not None)
    if len(num_steps) > 1:
        raise ValueError(
            f"{steps_dir}: its steps for {metric} {num_caches} are of policies with different numbers of denoising "
            f"steps, K = {num_steps}; move those of other policies away"
        )
    return StoredSchedule(metric, num_caches, num_steps[0] if num_steps else None, update_steps)


def available_schedules(steps_dir: str | Path) -> list[tuple[str, int]]:
    """The (metric, M) for which a steps directory holds steps of at least one block, sorted."""
    stored = _read_schedules(Path(steps_dir) / SCHEDULES_FILE)
    return sorted({*stored, *bacinfer_files.available_steps(steps_dir)})


_Schedules = dict[tuple[str, int], StoredSchedule]


@contextmanager
def _changing(path: Path) -> Iterator[_Schedules]:
    """The schedules in a file, to be changed; they are written afterwards. Other processes wait meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        stored = _read_schedules(path)
        yield stored
        schedules = [
            {
                "metric": schedule.metric,
                "num_caches": schedule.num_caches,
                "num_inference_steps": schedule.num_inference_steps,
                "update_steps": {block: [int(s) for s in steps] for block, steps in schedule.update_steps.items()},
            }
            for _, schedule in sorted(stored.items())
        ]
        write_json(path, {"version": JSON_VERSION, "schedules": schedules})


def _read_schedules(path: Path) -> _Schedules:
    """All schedules in a file, none where there is no file."""
    if not path.is_file():
        return {}
    schedules = _versioned(path, "schedules", list)
    stored = [_schedule(found, path) for found in schedules]
    by_key = {(schedule.metric, schedule.num_caches): schedule for schedule in stored}
    if len(by_key) < len(stored):
        raise ValueError(f"{path}: it has two schedules of one metric and num_caches, among {sorted(by_key)}")
    return by_key


def _schedule(found: Any, path: Path) -> StoredSchedule:
    fields = found if isinstance(found, dict) else {}
    metric, num_caches, num_steps, update_steps = (
        fields.get(name) for name in ("metric", "num_caches", "num_inference_steps", "update_steps")
    )
    if not (isinstance(metric, str) and type(num_caches) is type(num_steps) is int and isinstance(update_steps, dict)):
        raise ValueError(
            f"{path}: expected schedules with metric, num_caches, num_inference_steps and update_steps, found "
            f"{describe(found)}"
        )
    for block, steps in update_steps.items():
        if not isinstance(steps, list) or not all(type(s) is int for s in steps):
            raise ValueError(f"{path}: {block}: expected a list of update steps, found {describe(steps)}")
    return StoredSchedule(metric, num_caches, num_steps, update_steps)


def _versioned(path: Path, name: str, kind: type) -> Any:
    """What a JSON file of ours holds under a name."""
    data = read_json(path)
    if not isinstance(data, dict) or data.get("version") != JSON_VERSION or not isinstance(data.get(name), kind):
        raise ValueError(f"{path}: expected {name} of version {JSON_VERSION}, found {describe(data)}")
    return data[name]


# -- bubbling union ----------------------------------------------------------------------------------------------


def write_block_errors(run: RunAssets, errors: Mapping[str, float]) -> None:
    """Stores the errors of all blocks, from which the blocks of largest error follow."""
    write_json(run.block_errors, {"version": JSON_VERSION, "block_errors": dict(errors)})


def read_block_errors(run: RunAssets) -> dict[str, float]:
    """Block key to its error, of all blocks.

    Raises:
        FileNotFoundError: if there is neither our file nor BACInfer's; lists what is there.
        ValueError: if it is damaged or holds something else.
    """
    if run.block_errors.is_file():
        return bacinfer_files.check_block_errors(_versioned(run.block_errors, "block_errors", dict), run.block_errors)
    path = bacinfer_files.block_errors_file(run.directory)
    if path.is_file():
        return bacinfer_files.read_block_errors(path)
    raise FileNotFoundError(f"no {run.block_errors.name} in {run.directory}, which {contents(run.directory)}")


# -- residuals and matrices --------------------------------------------------------------------------------------


def write_by_block(path: Path, arrays: Mapping[str, NDArray[Any]], blocks: Iterable[str], **metadata: Any) -> None:
    """Writes arrays named by block key, or ``<block key>/<what it is>``, and the keys in the order of the forward."""
    write_arrays(path, arrays, {"blocks": list(blocks), **metadata})


def read_by_block(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """What `write_by_block` wrote, with all metadata; files of earlier versions, which name modules, in the same form.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or something else.
    """
    arrays, metadata = read_arrays(path)
    blocks = metadata.get("blocks")
    if isinstance(blocks, dict):  # module to block key
        arrays = {_renamed(name, blocks): array for name, array in arrays.items()}
        metadata["blocks"] = blocks = list(blocks.values())
    if not isinstance(blocks, list) or not all(isinstance(block, str) for block in blocks):
        raise ValueError(f"{path} was not written by this analysis: it does not say which blocks it is of; delete it")
    return arrays, metadata


def _renamed(name: str, blocks: Mapping[str, str]) -> str:
    if name in blocks:
        return blocks[name]
    module, separator, statistic = name.rpartition("/")
    return f"{blocks.get(module, module)}{separator}{statistic}"


def read_activations(run: RunAssets) -> dict[str, NDArray[Any]]:
    """Block key to its recorded residuals [K, ...].

    Raises:
        FileNotFoundError: if there is neither our file nor BACInfer's; lists what is there.
        ValueError: if it is damaged, or holds residuals of no block.
    """
    if run.activations.is_file():
        arrays, metadata = read_by_block(run.activations)
        if not metadata["blocks"] or set(metadata["blocks"]) != set(arrays):
            raise ValueError(f"{run.activations}: expected residuals of {metadata['blocks']}, found {list(arrays)[:5]}")
        return arrays
    path = run.activations.with_suffix(".pkl")
    if path.is_file():
        return bacinfer_files.read_activations(path)
    raise FileNotFoundError(
        f"no activations.npz or activations.pkl in {run.directory}, which {contents(run.directory)}; "
        f"record them first: python -m bacinfer.analysis.collect_activations --help"
    )


def read_matrices(run: RunAssets) -> dict[str, dict[str, NDArray[Any]]]:
    """Block key to what was found of its residuals' similarity: for each metric a matrix [K, K].

    Raises:
        FileNotFoundError: if there is neither our file nor BACInfer's; lists what is there.
        ValueError: if it is damaged or holds something else.
    """
    if run.similarity_matrices.is_file():
        arrays, metadata = read_by_block(run.similarity_matrices)
        matrices: dict[str, dict[str, NDArray[Any]]] = {block: {} for block in metadata["blocks"]}
        for name, array in arrays.items():
            block, _, statistic = name.rpartition("/")
            if array.ndim == 2:  # others are no matrices
                matrices.setdefault(block, {})[statistic] = array
        return matrices
    path = run.similarity_matrices.with_suffix(".pkl")
    if path.is_file():
        found = bacinfer_files.read_matrices(path)
        return {
            block: {name: np.asarray(matrix) for name, matrix in by_metric.items()}
            for block, by_metric in found.items()
        }
    raise FileNotFoundError(f"no similarity_matrices.npz or .pkl in {run.directory}, which {contents(run.directory)}")
