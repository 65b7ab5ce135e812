"""A results directory as one HTML page: ``bacinfer report``."""

from __future__ import annotations

import argparse
import sys

from bacinfer.commands.options import add_debug_argument, command_line, path_argument
from bacinfer.report.page import DEFAULT_PICTURED, PAGE_FILE, write_report


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bacinfer report",
        description="Writes a results directory as one HTML page that needs no network: tables, Pareto picture, "
        "schedules to point at, similarities, block errors and videos. The pictures for papers, and the "
        "table as CSV, lie beside it.",
    )
    parser.add_argument(
        "results_dir", type=path_argument, metavar="RESULTS", help="what eval, compare, batch or sweep wrote to"
    )
    parser.add_argument("-o", "--output", type=path_argument, metavar="PAGE", help=f"default: RESULTS/{PAGE_FILE}")
    parser.add_argument(
        "--pictured",
        type=int,
        default=DEFAULT_PICTURED,
        metavar="N",
        help="of how many comparisons (a checkpoint on the same episodes) there are pictures, schedules and videos; "
        "the table has all runs (default: %(default)s)",
    )
    parser.add_argument("--parquet", type=path_argument, metavar="FILE", help="write the table as Parquet, too")
    add_debug_argument(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    page = write_report(args.results_dir, args.output, num_pictured=args.pictured, parquet=args.parquet)
    figures, table = page.with_name(f"{page.stem}_figures"), page.with_suffix(".csv")
    print(f"report: {page} ({page.stat().st_size / 1e6:.1f} MB), pictures in {figures}, the table in {table}")
    return 0


main = command_line(run, build_parser)

if __name__ == "__main__":
    sys.exit(main())
