"""Reading back what the analysis, ours or BACInfer's, left in an assets directory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bacinfer import assets
from bacinfer.analysis.similarity import METRICS, Array, find_metric


def read_residuals(run: assets.RunAssets) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The recorded residuals [K, ...] of each block's module, and the module's block key.

    BACInfer records outputs of other modules as well; they are left out.

    Raises:
        FileNotFoundError: if nothing was recorded there; lists what is there.
        ValueError: if the file is damaged or holds no residuals of blocks.
    """
    metadata: dict[str, Any] = {}
    if run.activations.is_file():
        arrays, metadata = assets.read_arrays(run.activations)
    elif run.activations.with_suffix(".pkl").is_file():
        arrays = assets.read_activations(run.activations)
    else:
        raise FileNotFoundError(
            f"no activations.npz or activations.pkl in {run.directory}, which {contents(run.directory)}; "
            f"record them first: python -m bacinfer.analysis.collect_activations --help"
        )
    keys = metadata.get("blocks") or {module: key for module in arrays if (key := block_key(module))}
    if not keys or not set(keys) <= set(arrays):
        raise ValueError(f"the activations in {run.directory} are of no residual blocks: {list(arrays)[:5]}")
    return {module: torch.from_numpy(arrays[module]) for module in keys}, keys


def read_matrices(run: assets.RunAssets, metric: str) -> dict[str, Array]:
    """Module name to its similarity matrix of one metric, from ours or from BACInfer's file.

    Raises:
        FileNotFoundError: if there is neither; lists what is there.
        ValueError: if the file is damaged, or holds no matrices of this metric.
    """
    find_metric(metric)
    npz, pkl = run.similarity_matrices, run.similarity_matrices.with_suffix(".pkl")
    if npz.is_file():
        arrays = assets.read_arrays(npz)[0]
        nested: dict[str, dict[str, Any]] = {}
        for name, array in arrays.items():
            module, _, statistic = name.rpartition("/")
            nested.setdefault(module, {})[statistic] = array
    elif pkl.is_file():
        nested = assets.read_pickle(pkl)
        if not isinstance(nested, dict) or not all(isinstance(found, dict) for found in nested.values()):
            raise ValueError(f"{pkl}: expected a dict of modules to dicts of metrics to matrices")
    else:
        raise FileNotFoundError(
            f"no similarity_matrices.npz or .pkl in {run.directory}, which {contents(run.directory)}"
        )
    matrices = {module: np.asarray(found[metric]) for module, found in nested.items() if metric in found}
    if not matrices:
        there = sorted({name for found in nested.values() for name in found} & set(METRICS))
        raise ValueError(f"{run.directory} has no similarity matrices of metric {metric!r}, only of {there}")
    return matrices


def read_block_matrices(run: assets.RunAssets, metric: str) -> dict[str, Array]:
    """Block key to its similarity matrix of one metric; modules of which no block is known are left out.

    Raises:
        FileNotFoundError, ValueError: as `read_matrices`.
    """
    matrices = read_matrices(run, metric)
    npz = run.similarity_matrices
    recorded = assets.read_arrays(npz)[1].get("blocks", {}) if npz.is_file() else {}
    keys = {module: recorded.get(module) or block_key(module) for module in matrices}
    return {key: matrices[module] for module, key in keys.items() if key}


def contents(directory: Path) -> str:
    """What is in a directory, as the end of an error message."""
    if not directory.is_dir():
        return "does not exist"
    found = sorted(path.name for path in directory.iterdir())
    return f"holds {', '.join(found[:10])}{', …' if len(found) > 10 else ''}" if found else "is empty"


_KINDS = {
    "decoder": {"dropout1": "sa_block", "dropout2": "mha_block", "dropout3": "ff_block"},
    "encoder": {"dropout1": "sa_block", "dropout2": "ff_block"},
}


def block_key(module: str) -> str | None:
    """The key of a block of torch.nn's transformer layers, ``decoder.layers.0_ff_block`` for
    ``decoder.layers.0.dropout3``; None for other modules."""
    match = re.fullmatch(r"(.*?(decoder|encoder)\.layers\.\d+)\.(dropout\d)", module)
    kind = _KINDS[match[2]].get(match[3]) if match else None
    return f"{match[1]}_{kind}" if match and kind else None
