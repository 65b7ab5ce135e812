"""Blocks for bubbling union: ``python -m bacinfer.analysis.bu_block_selection``."""

from __future__ import annotations

import argparse
import sys

from bacinfer import assets
from bacinfer.analysis.block_selection import MAX_SELECTED, block_errors, write_selections
from bacinfer.analysis.recorded import read_residuals
from bacinfer.commands.options import add_bacinfer_files_argument, add_run_arguments, command_line, run_assets
from bacinfer.core.bubbling import select_blocks


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bacinfer.analysis.bu_block_selection",
        description="Selects the N residual blocks that change most over denoising, from the residuals recorded in "
        "OUT/TASK/MODE, and writes the errors of all blocks to OUT/TASK/MODE/block_errors.json.",
    )
    add_run_arguments(parser)
    parser.add_argument("--num_blocks", type=int, default=MAX_SELECTED, metavar="N", help=f"default: {MAX_SELECTED}")
    add_bacinfer_files_argument(parser)
    parser.add_argument("--force", action="store_true", help="recompute errors that are there already")
    return parser


def select(args: argparse.Namespace) -> int:
    run = run_assets(args)
    errors = None if args.force else _stored_errors(run)
    if errors is None:
        errors = block_errors(read_residuals(run))
    selected = select_blocks(errors, args.num_blocks)
    write_selections(run, errors, args.num_blocks, bacinfer_files_too=args.bacinfer_files)
    for block, error in selected.items():
        print(f"{error:10.6f}  {block}")
    print(f"top {args.num_blocks} of {len(errors)} blocks: {run.block_errors}")
    return 0


def _stored_errors(run: assets.RunAssets) -> dict[str, float] | None:
    try:
        errors = assets.read_block_errors(run)
    except FileNotFoundError:
        return None
    print(f"using the errors in {run.directory} (--force recomputes them)")
    return errors


main = command_line(select, build_parser)

if __name__ == "__main__":
    sys.exit(main())
