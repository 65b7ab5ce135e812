"""Residuals -> the high-error blocks that bubbling union (BU) extends (BAC, arXiv 2506.13456).

A block's error is how much its residual changes over denoising (`bacinfer.core.bubbling.block_error`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

from torch import Tensor

from bacinfer import assets
from bacinfer.analysis.recorded import add_run_arguments, read_residuals, run_assets
from bacinfer.analysis.similarity_metrics import check_residuals
from bacinfer.command_options import run_command
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


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bacinfer.analysis.bu_block_selection",
        description="Selects the N residual blocks that change most over denoising, from the residuals recorded in "
        "OUT/TASK/MODE, and writes them to OUT/TASK/MODE/bu_block_selection.",
    )
    add_run_arguments(parser)
    parser.add_argument("--num_blocks", type=int, default=MAX_SELECTED, metavar="N", help=f"default: {MAX_SELECTED}")
    parser.add_argument("--force", action="store_true", help="recompute errors that are there already")
    return parser


def select(args: argparse.Namespace) -> int:
    run = run_assets(args)
    if run.block_errors.is_file() and not args.force:
        print(f"using {run.block_errors} (--force recomputes it)")
        errors = assets.read_block_errors(run.block_errors)
    else:
        errors = block_errors(*read_residuals(run))
    selected = select_blocks(errors, args.num_blocks)
    write_selections(run, errors, args.num_blocks)
    for block, error in selected.items():
        print(f"{error:10.6f}  {block}")
    print(f"top {args.num_blocks} of {len(errors)} blocks: {run.selected_blocks(args.num_blocks)}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(select, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
