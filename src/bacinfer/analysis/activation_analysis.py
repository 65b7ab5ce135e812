"""Compares recorded residuals: ``python -m bacinfer.analysis.activation_analysis``."""

from __future__ import annotations

import argparse
import sys

from bacinfer.analysis.block_statistics import BlockStatistics
from bacinfer.analysis.recorded import read_residuals
from bacinfer.commands.options import add_metrics_argument, add_run_arguments, command_line, run_assets


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bacinfer.analysis.activation_analysis",
        description="Compares the residuals recorded in OUT/TASK/MODE/activations.npz between all denoising steps and "
        "writes OUT/TASK/MODE/similarity_matrices.npz.",
    )
    add_run_arguments(parser)
    add_metrics_argument(parser)
    parser.add_argument(
        "--force", action="store_true", help="overwrite matrices that are there already, averages over demos included"
    )
    return parser


def analyse(args: argparse.Namespace) -> int:
    run = run_assets(args)
    if run.similarity_matrices.is_file() and not args.force:
        raise ValueError(f"{run.similarity_matrices} is there already; pass --force to overwrite it")
    statistics = BlockStatistics(args.metrics)
    statistics.add(read_residuals(run))
    statistics.write(run.similarity_matrices, {})
    print(f"{len(statistics.blocks)} blocks, metrics {', '.join(statistics.metrics)}: {run.similarity_matrices}")
    return 0


main = command_line(analyse, build_parser)

if __name__ == "__main__":
    sys.exit(main())
