"""Update steps of one block: ``python -m bacinfer.analysis.optimal_cache_scheduler``."""

from __future__ import annotations

import argparse
import sys

from bacinfer import assets
from bacinfer.analysis.recorded import read_matrices
from bacinfer.analysis.similarity import METRICS, find_metric
from bacinfer.analysis.update_steps import objective, optimal_update_steps
from bacinfer.bacinfer_files import block_key, module_name, write_steps
from bacinfer.commands.options import (
    DEFAULT_NUM_CACHES,
    add_bacinfer_files_argument,
    add_debug_argument,
    command_line,
    integers,
    path_argument,
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bacinfer.analysis.optimal_cache_scheduler",
        description="Finds the best update steps of one residual block from its similarity matrix, prints them and "
        "writes them to DIR/optimal_steps/METRIC/schedules.json.",
    )
    parser.add_argument(
        "--similarity_matrices_dir",
        required=True,
        type=path_argument,
        metavar="DIR",
        help="directory with similarity_matrices.npz, such as assets/TASK/original",
    )
    parser.add_argument(
        "--module_name",
        metavar="NAME",
        help="the block, such as decoder.layers.0_sa_block, or its module, decoder.layers.0.dropout1",
    )
    parser.add_argument(
        "--num_caches", type=integers, metavar="M", help=f"numbers of update steps (default: {DEFAULT_NUM_CACHES})"
    )
    parser.add_argument("--metric", default="cosine", help=f"one of {', '.join(METRICS)} (default: cosine)")
    parser.add_argument("--list_modules", action="store_true", help="only list the blocks that have a matrix")
    add_bacinfer_files_argument(parser)
    add_debug_argument(parser)
    return parser


def schedule(args: argparse.Namespace) -> int:
    if args.list_modules and (args.module_name is not None or args.num_caches is not None or args.bacinfer_files):
        raise ValueError("--list_modules only lists: leave out --module_name, --num_caches and --bacinfer_files")
    run = assets.RunAssets(args.similarity_matrices_dir)
    matrices = read_matrices(run, args.metric)
    if args.list_modules:
        print("\n".join(matrices))
        return 0
    block = args.module_name if args.module_name in matrices else block_key(args.module_name or "")
    if block not in matrices:
        given = "--module_name is missing" if args.module_name is None else f"no block {args.module_name!r}"
        raise ValueError(f"{given}; {run.directory} has matrices of {', '.join(matrices)}")
    if args.bacinfer_files:
        module_name(block)  # refused before anything is written
    matrix, steps_dir = matrices[block], run.steps_dir(args.metric)
    budgets = args.num_caches or [DEFAULT_NUM_CACHES]
    found = optimal_update_steps(matrix, budgets, maximise=find_metric(args.metric).maximise)
    for budget, steps in found.items():
        path = assets.write_block_steps(steps_dir, block, args.metric, steps, len(matrix))
        if args.bacinfer_files:
            write_steps(steps_dir, block, args.metric, steps, len(matrix))
        print(
            f"M = {budget}: {' '.join(map(str, steps))}  (sum of {args.metric} {objective(matrix, steps):.6g}) {path}"
        )
    return 0


main = command_line(schedule, build_parser)

if __name__ == "__main__":
    sys.exit(main())
