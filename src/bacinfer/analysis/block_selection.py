"""Residuals -> the high-error blocks that bubbling union (BU) extends (BAC, arXiv 2506.13456).

A block's error is how much its residual changes over denoising (`bacinfer.core.bubbling.block_error`).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from bacinfer import assets
from bacinfer.analysis.similarity import check_residuals
from bacinfer.core.bubbling import block_error, select_blocks

MAX_SELECTED = 5


def block_errors(residuals: Mapping[str, Tensor], block_keys: Mapping[str, str]) -> dict[str, float]:
    """Block key to error.

    Args:
        residuals: Module name to its residuals [K, ...].
        block_keys: Module name to block key.

    Raises:
        ValueError: if a residual is not finite, or there are fewer than two steps.
    """
    for module, block in residuals.items():
        check_residuals(block, module)
    return {block_keys[module]: block_error(block) for module, block in residuals.items()}


def write_selections(run: assets.RunAssets, errors: Mapping[str, float], max_blocks: int = MAX_SELECTED) -> None:
    """Stores all errors and, for every N up to `max_blocks`, the N blocks of largest error."""
    assets.write_pickle(run.block_errors, dict(errors))
    for num_blocks in range(1, min(max_blocks, len(errors)) + 1):
        assets.write_pickle(run.selected_blocks(num_blocks), select_blocks(errors, num_blocks))
