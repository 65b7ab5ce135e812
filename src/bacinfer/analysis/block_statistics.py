"""Residuals -> similarity matrices and block errors, averaged over observations (BAC, arXiv 2506.13456)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from bacinfer import assets
from bacinfer.analysis.similarity import Array, similarity
from bacinfer.core.bubbling import block_error

DEFAULT_METRICS = ("cosine", "l1", "mse")
BLOCK_ERROR = "block_error"  # the entry of a block's statistics that is not a metric's


class RunningMean:
    """Means of named arrays over observations, in memory that does not grow with their number.

    The means are rounded to float32 after each observation, as they are when stored, so that a run which was
    interrupted and goes on from its file ends with the very same numbers as one that was not.
    """

    def __init__(self, means: Mapping[str, Array] | None = None, count: int = 0) -> None:
        self.means: dict[str, Array] = dict(means or {})
        self.count = count

    def add(self, values: Mapping[str, Array]) -> None:
        """Takes the arrays of one more observation into the means.

        Raises:
            ValueError: if their names or shapes differ from those of the observations before.
        """
        if self.count and {n: v.shape for n, v in values.items()} != {n: m.shape for n, m in self.means.items()}:
            raise ValueError("an observation's arrays differ in name or shape from those before; was K changed?")
        self.count += 1
        for name, value in values.items():
            mean = self.means[name].astype(np.float64) if name in self.means else np.float64(0)
            self.means[name] = np.asarray(mean + (value - mean) / self.count, dtype=np.float32)


class BlockStatistics:
    """What the scheduler and bubbling union need of each block, averaged over observations.

    Attributes:
        metrics: The metrics whose matrices are kept.
        blocks: Block keys, in the order of the forward.
    """

    def __init__(self, metrics: Iterable[str], blocks: Iterable[str] = (), mean: RunningMean | None = None) -> None:
        self.metrics = tuple(metrics)
        self.blocks = tuple(blocks)
        self._mean = mean or RunningMean()

    @property
    def num_observations(self) -> int:
        return self._mean.count

    def add(self, residuals: Mapping[str, Tensor]) -> None:
        """Takes in the residuals [K, ...] of one observation, of all blocks.

        Raises:
            ValueError: if a residual is not finite, or the blocks or K are others than before.
        """
        values: dict[str, Array] = {}
        for block, residual in tqdm(residuals.items(), desc="comparing residuals", unit="block", leave=False):
            for metric, matrix in similarity(residual, self.metrics, block).items():
                values[f"{block}/{metric}"] = matrix
            values[f"{block}/{BLOCK_ERROR}"] = np.array(block_error(residual))
        self._mean.add(values)
        self.blocks = tuple(residuals)

    def matrices(self, metric: str) -> dict[str, Array]:
        """Block key to its similarity matrix [K, K]."""
        return {block: self._mean.means[f"{block}/{metric}"] for block in self.blocks}

    def block_errors(self) -> dict[str, float]:
        """Block key to its error, what bubbling union selects by."""
        return {block: float(self._mean.means[f"{block}/{BLOCK_ERROR}"]) for block in self.blocks}

    def write(self, path: Path, metadata: Mapping[str, Any]) -> None:
        """Stores the statistics as an .npz of arrays ``block/metric``, with what is needed to go on later."""
        state = {"metrics": self.metrics, "num_observations": self.num_observations}
        assets.write_by_block(path, self._mean.means, self.blocks, **state, **metadata)

    @classmethod
    def read(cls, path: Path) -> tuple[BlockStatistics, dict[str, Any]]:
        """What `write` stored, and all of its metadata.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged or something else.
        """
        arrays, metadata = assets.read_by_block(path)
        try:
            mean = RunningMean(arrays, metadata["num_observations"])
            statistics = cls(metadata["metrics"], metadata["blocks"], mean)
            expected = {f"{b}/{s}" for b in statistics.blocks for s in (*statistics.metrics, BLOCK_ERROR)}
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} was not written by this analysis ({error!r}); delete it") from error
        if expected != set(arrays):
            raise ValueError(f"{path} is incomplete: {sorted(expected ^ set(arrays))[:3]}; delete it")
        return statistics, metadata
