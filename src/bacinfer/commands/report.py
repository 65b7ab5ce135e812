"""A results directory as one HTML page that needs nothing but itself: ``bacinfer report``."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from base64 import b64encode
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from tqdm import tqdm

from bacinfer.commands.options import add_debug_argument, path_argument, run_command
from bacinfer.experiments.results_table import TABLE_FILE, ResultsTable
from bacinfer.files import atomic_write, contents
from bacinfer.measure.statistics import CONFIDENCE
from bacinfer.report.contents import comparisons, facts, run_table, sections

PAGE_FILE = "report.html"
DEFAULT_PICTURED = 2


def write_report(
    results_dir: str | Path, page: str | Path | None = None, *, num_pictured: int = DEFAULT_PICTURED
) -> Path:
    """Writes the page, and its pictures as .png and .svg into a directory ``<page>_figures`` beside it.

    Args:
        results_dir: Laid out as `results_table` says.
        page: ``report.html`` in there if None.
        num_pictured: Of how many comparisons (a checkpoint, the same episodes) pictures, schedules and videos are
            shown, the first ones of the table; the table itself always has all runs.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError: there is no results table, or it has no rows yet.
        ValueError: it is damaged, no results table, or of another version; or a negative `num_pictured`.
    """
    results_dir = Path(results_dir)
    page = results_dir / PAGE_FILE if page is None else Path(page)
    if num_pictured < 0:
        raise ValueError(f"--pictured {num_pictured} is negative")
    rows = ResultsTable(results_dir).rows()
    if not rows:
        raise FileNotFoundError(
            f"no results in {results_dir}, which {contents(results_dir)}: expected a {TABLE_FILE} with at least one "
            "run, as bacinfer eval, compare, batch and sweep leave it in their results directory"
        )
    groups = comparisons(rows)
    pictured = groups[:num_pictured]
    figures = page.with_name(f"{page.stem}_figures")
    drawn = list(tqdm(sections(pictured, results_dir, figures), desc="drawing", unit="checkpoint", leave=False))

    environment = Environment(
        loader=PackageLoader("bacinfer.evaluation", "report_template"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script, style = (_source(environment, name) for name in ("page.js", "page.css"))
    html = environment.get_template("page.html").render(
        script=script,
        script_hash=b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=style,
        results_dir=results_dir,
        written=datetime.now(timezone.utc).isoformat(timespec="minutes"),
        num_checkpoints=len({row.checkpoint_sha256 for row in rows}),
        table=run_table(rows),
        facts=facts(rows),
        noise_errors=sorted({f"{row.noise_error:.3f}" for row in rows}),
        sections=drawn,
        num_left_out=len(groups) - len(pictured),
        num_comparisons=len(groups),
        confidence=f"{CONFIDENCE:.0%}",
        beside=lambda path: os.path.relpath(path, page.parent),
    )
    with atomic_write(page) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return page


def _source(environment: Environment, name: str) -> Markup:
    """A file of the template that is no template itself."""
    assert environment.loader is not None
    return Markup(environment.loader.get_source(environment, name)[0])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bacinfer report",
        description="Writes a results directory as one HTML page that needs no network: tables, Pareto picture, "
        "schedules to point at, similarities, block errors and videos. The pictures for papers lie beside it.",
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
    add_debug_argument(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    page = write_report(args.results_dir, args.output, num_pictured=args.pictured)
    print(f"report: {page} ({page.stat().st_size / 1e6:.1f} MB), pictures in {page.with_name(f'{page.stem}_figures')}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(run, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
