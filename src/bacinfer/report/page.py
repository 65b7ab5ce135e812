"""A results directory as one HTML page that needs nothing but itself."""

from __future__ import annotations

import hashlib
import os
from base64 import b64encode
from pathlib import Path

from tqdm import tqdm

from bacinfer.experiments.store import ROW_FILE, RUNS, ResultsStore
from bacinfer.files import atomic_write, contents
from bacinfer.measurement.statistics import CONFIDENCE
from bacinfer.report.sections.checkpoint import sections
from bacinfer.report.sections.comparisons import comparisons
from bacinfer.report.sections.runs import facts, run_table
from bacinfer.report.table import export_csv, export_parquet
from bacinfer.report.templating import render, source

PAGE_FILE = "report.html"
DEFAULT_PICTURED = 2


def write_report(
    results_dir: str | Path,
    page: str | Path | None = None,
    *,
    num_pictured: int = DEFAULT_PICTURED,
    parquet: Path | None = None,
) -> Path:
    """Writes the page; its pictures as .png and .svg into a directory ``<page>_figures`` beside it; all rows as .csv.

    Args:
        results_dir: Laid out as `bacinfer.experiments.store` says.
        page: ``report.html`` in there if None.
        num_pictured: Of how many comparisons (a checkpoint, the same episodes) pictures, schedules and videos are
            shown, the first ones of the table; the table itself always has all runs.
        parquet: Where all rows go as a Parquet file, too; None writes none.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError: there are no results.
        ValueError: a row is damaged or of another version; or a negative `num_pictured`.
        RuntimeError: PyArrow is missing, which `parquet` needs.
    """
    results_dir = Path(results_dir)
    page = results_dir / PAGE_FILE if page is None else Path(page)
    if num_pictured < 0:
        raise ValueError(f"--pictured {num_pictured} is negative")
    rows = ResultsStore(results_dir).rows()
    if not rows:
        raise FileNotFoundError(
            f"no results in {results_dir}, which {contents(results_dir)}: expected {RUNS}/*/{ROW_FILE} of at least one "
            "run, as bacinfer eval, compare, batch and sweep leave them in their results directory"
        )
    export_csv(page.with_suffix(".csv"), rows)
    if parquet is not None:
        export_parquet(parquet, rows)
    groups = comparisons(rows)
    pictured = groups[:num_pictured]
    figures = page.with_name(f"{page.stem}_figures")
    drawn = list(tqdm(sections(pictured, results_dir, figures), desc="drawing", unit="checkpoint", leave=False))

    script = source("page.js")
    html = render(
        "page.html",
        script=script,
        script_hash=b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        title=results_dir,
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
