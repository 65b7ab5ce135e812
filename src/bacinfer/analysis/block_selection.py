"""Residuals -> the high-error blocks that bubbling union (BU) extends (BAC, arXiv 2506.13456).

A block's error is how much its residual changes over denoising (`bacinfer.core.bubbling.block_error`).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from bacinfer import assets, bacinfer_files
from bacinfer.analysis.similarity import check_residuals
from bacinfer.core.bubbling import block_error, select_blocks

MAX_SELECTED = 5


def block_errors(residuals: Mapping[str, Tensor]) -> dict[str, float]:
    """Block key to error, from block key to residuals [K, ...].

    Raises:
        ValueError: if a residual is not finite, or there are fewer than two steps.
    """
    for block, values in residuals.items():
        check_residuals(values, block)
    return {block: block_error(values) for block, values in residuals.items()}


def write_selections(
    run: assets.RunAssets,
    errors: Mapping[str, float],
    max_blocks: int = MAX_SELECTED,
    *,
    bacinfer_files_too: bool = False,
) -> None:
    """Stores all errors; for BACInfer also, for every N up to `max_blocks`, the N blocks of largest error."""
    assets.write_block_errors(run, errors)
    if bacinfer_files_too:
        bacinfer_files.write_pickle(bacinfer_files.block_errors_file(run.directory), dict(errors))
        for num_blocks in range(1, min(max_blocks, len(errors)) + 1):
            path = bacinfer_files.selection_file(run.directory, num_blocks)
            bacinfer_files.write_pickle(path, select_blocks(errors, num_blocks))
