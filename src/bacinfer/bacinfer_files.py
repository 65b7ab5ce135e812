"""BACInfer's files: pickles that name a block after a module, ``decoder.layers.0.dropout1``.

::

    activations.pkl                         {module: residuals, one a denoising step}
    similarity_matrices.pkl                 {module: {metric: K×K}}
    optimal_steps/<metric>/<module>/optimal_steps_<module>_<M>_<metric>.pkl|.json|.txt      list[int]
    bu_block_selection/block_l1_errors.pkl, top_<N>_error_blocks.pkl                        dict[block key, error]

They are read as they are found, and written where somebody asks for them. Nothing here unpickles arbitrary objects.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bacinfer import safe_pickle
from bacinfer.files import atomic_write, describe, parse_json, write_text

_PLAIN_DATA = {**safe_pickle.TENSOR_GLOBALS, **safe_pickle.ARRAY_GLOBALS}

# -- names of blocks ---------------------------------------------------------------------------------------------

_KINDS = {
    "decoder": {"dropout1": "sa_block", "dropout2": "mha_block", "dropout3": "ff_block"},
    "encoder": {"dropout1": "sa_block", "dropout2": "ff_block"},
}
_DROPOUTS = {stack: {kind: dropout for dropout, kind in kinds.items()} for stack, kinds in _KINDS.items()}


def block_key(module: str) -> str | None:
    """The block of a module: ``decoder.layers.0_ff_block`` for ``decoder.layers.0.dropout3``; None if it has none."""
    match = re.fullmatch(r"(.*?(decoder|encoder)\.layers\.\d+)\.(dropout\d)", module)
    kind = _KINDS[match[2]].get(match[3]) if match else None
    return f"{match[1]}_{kind}" if match and kind else None


def module_name(block: str) -> str:
    """The module of a block, the inverse of `block_key`.

    Raises:
        ValueError: BACInfer has no name for it.
    """
    match = re.fullmatch(r"(.*?(decoder|encoder)\.layers\.\d+)_(\w+)", block)
    dropout = _DROPOUTS[match[2]].get(match[3]) if match else None
    if match is None or dropout is None:
        raise ValueError(
            f"BACInfer's files cannot name the block {block!r}: they know those of PyTorch's layers in "
            f"decoder.layers and encoder.layers alone; leave out --bacinfer_files"
        )
    return f"{match[1]}.{dropout}"


# -- update steps ------------------------------------------------------------------------------------------------


def steps_file(steps_dir: str | Path, module: str, num_caches: int, metric: str) -> Path:
    """``<steps_dir>/<module>/optimal_steps_<module>_<num_caches>_<metric>.pkl``."""
    return Path(steps_dir) / module / f"optimal_steps_{module}_{num_caches}_{metric}.pkl"


def write_steps(steps_dir: str | Path, block: str, metric: str, steps: Sequence[int], num_inference_steps: int) -> Path:
    """Writes a block's update steps as .pkl, .json and .txt; returns the .pkl's path.

    Raises:
        ValueError: BACInfer has no name for the block.
    """
    steps = [int(s) for s in steps]
    path = steps_file(steps_dir, module_name(block), len(steps), metric)
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


def steps_files(steps_dir: str | Path, num_caches: int, metric: str) -> dict[str, Path]:
    """Block key to its steps file, in the order of the layers; modules that are no blocks are left out."""
    files = {}
    for directory in sorted(Path(steps_dir).glob("*/"), key=lambda path: _in_order(path.name)):
        block, path = block_key(directory.name), steps_file(steps_dir, directory.name, num_caches, metric)
        if block is not None and path.is_file():
            files[block] = path
    return files


def read_steps(path: str | Path) -> tuple[list[int], int | None]:
    """The update steps in a steps file, and the K that it was made for, which BACInfer's own do not say (None).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it, or the description beside it, holds something else.
    """
    path = Path(path)
    steps = read_pickle(path)
    if isinstance(steps, np.ndarray):
        steps = steps.tolist()
    if not isinstance(steps, (list, tuple)):
        raise ValueError(f"{path}: expected a list of update steps, found {describe(steps)}")
    if not all(type(s) is int or isinstance(s, np.integer) for s in steps):
        raise ValueError(f"{path}: update steps must be integers, found {describe(steps)}")
    return [int(s) for s in steps], _recorded_num_steps(path.with_suffix(".json"))


def _recorded_num_steps(description: Path) -> int | None:
    if not description.is_file():
        return None
    recorded = parse_json(description.read_bytes(), description)
    number = recorded.get("num_inference_steps") if isinstance(recorded, dict) else "no description"
    if number is not None and type(number) is not int:
        raise ValueError(f"{description}: expected the description of a schedule, found {describe(recorded)}")
    return number


def available_steps(steps_dir: str | Path) -> set[tuple[str, int]]:
    """The (metric, num_caches) for which there are steps of at least one module."""
    found = set()
    for path in Path(steps_dir).glob("*/optimal_steps_*.pkl"):
        match = re.fullmatch(rf"optimal_steps_{re.escape(path.parent.name)}_(\d+)_(\w+)", path.stem)
        if match:
            found.add((match[2], int(match[1])))
    return found


def _in_order(module: str) -> list[tuple[int, str]]:
    """Sorts module names with their numbers as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", module)]


# -- bubbling union ----------------------------------------------------------------------------------------------


def block_errors_file(run: Path) -> Path:
    return run / "bu_block_selection" / "block_l1_errors.pkl"


def selection_file(run: Path, num_blocks: int) -> Path:
    return run / "bu_block_selection" / f"top_{num_blocks}_error_blocks.pkl"


def read_block_errors(path: str | Path) -> dict[str, float]:
    """A pickled ``dict[block key, error]``: the errors of all blocks, or those of the selected ones.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else, or errors that are no finite numbers.
    """
    return check_block_errors(read_pickle(path), path)


def check_block_errors(errors: Any, path: str | Path) -> dict[str, float]:
    """What a file says are errors, if they are; raises ValueError that names the file."""
    if not isinstance(errors, dict) or not all(isinstance(k, str) and _is_finite(v) for k, v in errors.items()):
        raise ValueError(f"{path}: expected a dict from block keys to errors, found {describe(errors)}")
    return {key: float(value) for key, value in errors.items()}


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, (int, float, np.integer, np.floating)) and math.isfinite(value)
    except OverflowError:  # no float is so large
        return False


# -- residuals and matrices --------------------------------------------------------------------------------------


def read_activations(path: Path) -> dict[str, NDArray[Any]]:
    """Block key to its residuals [K, ...]; BACInfer records outputs of other modules as well, which are left out.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else, or residuals of no block.
    """
    activations = read_pickle(path)
    if not isinstance(activations, dict):
        raise ValueError(f"{path}: expected a dict from modules to residuals, found {describe(activations)}")
    try:
        arrays = {key: _stack(activations[module]) for module, key in _blocks(activations)}
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: the residuals of a module must be arrays of one shape: {error}") from error
    if not arrays:
        raise ValueError(f"{path} is of no residual blocks: {safe_pickle.shorten(list(activations)[:5])}")
    return arrays


def read_matrices(path: Path) -> dict[str, dict[str, Any]]:
    """Block key to its similarity matrices, a K×K for each metric; modules that are no blocks are left out.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else.
    """
    matrices = read_pickle(path)
    if not isinstance(matrices, dict) or not all(isinstance(found, dict) for found in matrices.values()):
        raise ValueError(f"{path}: expected a dict of modules to dicts of metrics to matrices")
    return {key: matrices[module] for module, key in _blocks(matrices)}


def _blocks(modules: Iterable[Any]) -> list[tuple[str, str]]:
    return [(module, key) for module in modules if isinstance(module, str) and (key := block_key(module)) is not None]


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


# -- pickles -----------------------------------------------------------------------------------------------------


def write_pickle(path: str | Path, data: list[int] | Mapping[str, float]) -> None:
    """Pickles plain data, readable by any Python."""
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
