"""The one place that knows an assets directory: its paths, its formats, atomic writes and safe reads.

::

    assets/<task>/original/
        activations.npz                      residuals of one run, [K, ...] a module (BACInfer: activations.pkl)
        similarity_matrices.npz              a K×K matrix a module and metric
        optimal_steps/<metric>/<module>/optimal_steps_<module>_<M>_<metric>.pkl|.json|.txt
        bu_block_selection/block_l1_errors.pkl, top_<N>_error_blocks.pkl

The pickles are those that BACInfer reads and writes: a ``list[int]`` and a ``dict[str, float]``; its recordings are
dicts of arrays or tensors. Nothing here unpickles arbitrary objects.
"""

from __future__ import annotations

import fcntl
import glob
import json
import math
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bacinfer import safe_pickle
from bacinfer.safe_zip import open_zip

_METADATA = "metadata.json"  # the entry of an .npz file that holds its metadata
_PLAIN_DATA = {**safe_pickle.TENSOR_GLOBALS, **safe_pickle.ARRAY_GLOBALS}


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

    def steps_dir(self, metric: str) -> Path:
        """What `apply_cache` takes as `optimal_steps_dir`."""
        return self.directory / "optimal_steps" / metric

    @property
    def block_errors(self) -> Path:
        return self.directory / "bu_block_selection" / "block_l1_errors.pkl"

    def selected_blocks(self, num_blocks: int) -> Path:
        return self.directory / "bu_block_selection" / f"top_{num_blocks}_error_blocks.pkl"

    @classmethod
    def of_steps_dir(cls, steps_dir: str | Path) -> RunAssets:
        """The run directory that a steps directory ``<run>/optimal_steps/<metric>`` lies in."""
        return cls(Path(steps_dir).resolve().parent.parent)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary path near `path` to write to; it replaces `path` once the block ends without an exception.

    A full disk or a killed process leaves the old file as it was. Missing directories are made. What killed writers of
    `path` left is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_overs(path)
    with _temporary_directory(path) as directory:
        temporary = directory / path.name
        yield temporary
        os.replace(temporary, path)


# A writer locks the directory that it writes in while it lives: one without a lock was left by a writer that died. The
# lock is not on the file itself, as some writers, such as a linker, replace that.

_PART = ".part"


@contextmanager
def _temporary_directory(path: Path) -> Iterator[Path]:
    """A new directory beside `path`, locked while the block runs."""
    while True:
        directory = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_PART, dir=path.parent))
        lock = _lock(directory, fcntl.LOCK_EX)
        if directory.is_dir():  # otherwise `_remove_left_overs` of another writer came before the lock
            break
        _unlock(lock)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        _unlock(lock)


def _remove_left_overs(path: Path) -> None:
    for directory in path.parent.glob(f".{glob.escape(path.name)}.{'?' * 8}{_PART}"):
        lock = _lock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if lock is not None:
            shutil.rmtree(directory, ignore_errors=True)
            _unlock(lock)


def _lock(directory: Path, operation: int) -> int | None:
    """What holds the lock of a directory; None if another holds it, or it is gone, or its file system has no locks."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, operation)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


# -- update steps ------------------------------------------------------------------------------------------------


def steps_file(steps_dir: str | Path, module: str, num_caches: int, metric: str) -> Path:
    """``<steps_dir>/<module>/optimal_steps_<module>_<num_caches>_<metric>.pkl``."""
    return Path(steps_dir) / module / f"optimal_steps_{module}_{num_caches}_{metric}.pkl"


def write_steps(
    steps_dir: str | Path, module: str, metric: str, steps: Sequence[int], num_inference_steps: int
) -> Path:
    """Writes a module's update steps as .pkl (as BACInfer reads it), .json and .txt; returns the .pkl's path."""
    steps = [int(s) for s in steps]
    path = steps_file(steps_dir, module, len(steps), metric)
    description = {
        "metric": metric,
        "steps": steps,
        "num_steps": len(steps),
        "num_inference_steps": num_inference_steps,
    }
    write_text(path.with_suffix(".json"), json.dumps(description) + "\n")
    write_text(path.with_suffix(".txt"), " ".join(map(str, steps)) + "\n")
    write_pickle(path, steps)
    return path


def read_steps(path: str | Path, num_inference_steps: int) -> list[int]:
    """The update steps in a steps file, unchecked but for their types and, where it is recorded, their K.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else than a list of integers, or its .json says that it was made for
            another number of denoising steps.
    """
    path = Path(path)
    steps = read_pickle(path)
    if isinstance(steps, np.ndarray):
        steps = steps.tolist()
    if not isinstance(steps, (list, tuple)):
        raise ValueError(f"{path}: expected a list of update steps, found {_describe(steps)}")
    if not all(type(s) is int or isinstance(s, np.integer) for s in steps):
        raise ValueError(f"{path}: update steps must be integers, found {_describe(steps)}")
    description = path.with_suffix(".json")
    if description.is_file():
        recorded = parse_json(description.read_bytes(), description)
        made_for = recorded.get("num_inference_steps", num_inference_steps) if isinstance(recorded, dict) else None
        if made_for != num_inference_steps:
            raise ValueError(
                f"{path} was made for K = {safe_pickle.shorten(made_for)} denoising steps, the policy has "
                f"{num_inference_steps}; run the analysis again for this policy"
            )
    return [int(s) for s in steps]


def available_steps(steps_dir: str | Path) -> list[tuple[str, int]]:
    """The (metric, num_caches) for which a steps directory holds steps of at least one module, sorted."""
    found = set()
    for path in Path(steps_dir).glob("*/optimal_steps_*.pkl"):
        match = re.fullmatch(rf"optimal_steps_{re.escape(path.parent.name)}_(\d+)_(\w+)", path.stem)
        if match:
            found.add((match[2], int(match[1])))
    return sorted(found)


# -- bubbling union ----------------------------------------------------------------------------------------------


def read_block_errors(path: str | Path) -> dict[str, float]:
    """A pickled ``dict[block key, error]``: the errors of all blocks, or those of the selected ones.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else, or errors that are no finite numbers.
    """
    errors = read_pickle(path)
    if not isinstance(errors, dict) or not all(isinstance(k, str) and _is_finite(v) for k, v in errors.items()):
        raise ValueError(f"{path}: expected a dict from block keys to errors, found {_describe(errors)}")
    return {key: float(value) for key, value in errors.items()}


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, (int, float, np.integer, np.floating)) and math.isfinite(value)
    except OverflowError:  # no float is so large
        return False


# -- residuals ---------------------------------------------------------------------------------------------------


def read_activations(path: str | Path) -> dict[str, NDArray[Any]]:
    """Module to its residuals [K, ...], from an .npz or from BACInfer's .pkl beside it.

    Raises:
        FileNotFoundError: if neither is there.
        ValueError: if the file holds something else.
    """
    path = Path(path)
    if path.with_suffix(".npz").is_file():
        return read_arrays(path.with_suffix(".npz"))[0]
    path = path.with_suffix(".pkl")
    if not path.is_file():
        raise FileNotFoundError(f"no activations at {path.with_suffix('.npz')} (or .pkl); record them first")
    activations = read_pickle(path)
    if not isinstance(activations, dict):
        raise ValueError(f"{path}: expected a dict from modules to residuals, found {_describe(activations)}")
    try:
        return {str(module): _stack(residuals) for module, residuals in activations.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: the residuals of a module must be arrays of one shape: {error}") from error


def _stack(residuals: Any) -> NDArray[Any]:
    """Residuals as BACInfer stores them, an array or a list of arrays, one a denoising step: [K, ...]."""
    if isinstance(residuals, (list, tuple)):
        return np.stack([_stack(r) for r in residuals])
    if hasattr(residuals, "detach"):  # a tensor; numpy knows no bfloat16
        residuals = residuals.detach().cpu()
        residuals = (residuals.float() if residuals.is_floating_point() else residuals).numpy()
    array = np.asarray(residuals)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"found an array of {array.dtype}")
    return array


# -- formats -----------------------------------------------------------------------------------------------------


def write_arrays(
    path: str | Path, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any] | None = None
) -> None:
    """Writes named arrays, and metadata that JSON can hold, to one .npz file."""
    entries = {**arrays, _METADATA: np.array(json.dumps(metadata or {}))}
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **entries)  # type: ignore[arg-type]


def read_arrays(path: str | Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The arrays and the metadata that `write_arrays` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or no .npz file of plain arrays.
    """
    path = Path(path)
    try:
        with open_zip(path), np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        metadata = parse_json(str(arrays.pop(_METADATA, "{}")).encode(), path)
        other = [name for name, array in arrays.items() if array.dtype.kind not in "biufc"]
        if other or not isinstance(metadata, dict):
            raise ValueError(f"found {safe_pickle.shorten(other[:1] or metadata)} where numbers are expected")
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged archive can raise nearly anything
        raise ValueError(
            f"{path} is not a complete .npz file of plain arrays ({type(error).__name__}: "
            f"{safe_pickle.shorten(error)}); delete it and make it again"
        ) from error
    return arrays, metadata


def write_pickle(path: str | Path, data: Any) -> None:
    """Pickles plain data (lists, dicts, numbers, strings), readable by any Python."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        pickle.dump(data, file, protocol=4)


def read_pickle(path: str | Path) -> Any:
    """Unpickles lists, dicts, numbers, strings, arrays and tensors, and nothing else.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or holds anything else; names the file and the type.
    """
    data = Path(path).read_bytes()
    try:
        return safe_pickle.load(data, _PLAIN_DATA)
    except safe_pickle.UnsafePickleError as error:
        raise ValueError(
            f"{path}: {error}; an assets file holds plain data only, so nothing of it was loaded"
        ) from error
    except safe_pickle.DamagedPickleError as error:
        raise ValueError(f"{path}: {error}") from error


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, data: Any) -> None:
    """Writes data that JSON can hold, for people to read as well."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def read_json(path: str | Path) -> Any:
    """What `write_json` wrote, or another JSON file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no JSON; names the file and the line.
    """
    return parse_json(Path(path).read_bytes(), Path(path))


def parse_json(text: bytes, path: Path, line: int = 1) -> Any:
    """The JSON in `text`, which stands in a file from a line on; raises ValueError that names both."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {line + error.lineno - 1}: this is no JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {line}: this is no JSON ({error})") from error


def _describe(data: Any) -> str:
    return f"{type(data).__name__} {safe_pickle.shorten(data)}"


def check_path(text: str) -> str:
    """The path itself, if every file and table of results can hold it.

    Raises:
        ValueError: it is empty, or has a line break, a NUL or a byte that is no UTF-8.
    """
    if not text:
        raise ValueError("the path is empty; the current directory is '.'")
    if re.search("[\n\r\0\ud800-\udfff]", text):  # (surrogates stand for bytes that are no UTF-8)
        raise ValueError(f"a path may have no line break, no NUL and no byte that is not UTF-8, got {text!r}")
    return text
