"""What schedules were found from: similarities and errors of the blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bacinfer.analysis.plots import plot_block_errors, plot_similarities
from bacinfer.analysis.recorded import read_matrices
from bacinfer.assets import RunAssets, read_block_errors
from bacinfer.core.cache_request import DEFAULT_METRIC
from bacinfer.core.optimal_steps import stored_selection
from bacinfer.experiments.store import Row
from bacinfer.report.sections.shared import Picture, assets_of, drawn, grouped, read_or_note, slug


@dataclass
class Analysis:
    """What schedules were found from: similarities and errors of the blocks."""

    directory: str
    pictures: list[Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def analyses(rows: Sequence[Row], results_dir: Path, figures: Path) -> list[Analysis]:
    """One for each assets directory that the rows' schedules were found from."""
    analysed = [row for row in rows if row.assets is not None]
    by_assets = grouped(analysed, lambda row: assets_of(row, results_dir).directory)
    return [
        _analysis(RunAssets(directory), users, figures / slug(f"analysis-{number}-{directory.name}"))
        for number, (directory, users) in enumerate(by_assets.items())
    ]


def _analysis(run: RunAssets, rows: Sequence[Row], figures: Path) -> Analysis:
    analysis = Analysis(str(run.directory))
    if not run.directory.is_dir():
        analysis.notes.append(f"The assets directory is no longer there: {run.directory}")
        return analysis
    for metric in dict.fromkeys(row.metric or DEFAULT_METRIC for row in rows):
        matrices = read_or_note(analysis.notes, read_matrices, run, metric)
        if matrices:
            title, path = f"Similarity of the blocks' residuals: {metric}", figures / f"similarity_{metric}"
            analysis.pictures.append(drawn(title, path, plot_similarities, matrices, metric))
    errors = read_or_note(analysis.notes, read_block_errors, run)
    if errors:
        num_blocks = max(row.num_bu_blocks or 0 for row in rows)
        selected = read_or_note(analysis.notes, stored_selection, run, num_blocks) if num_blocks else None
        path = figures / "block_errors"
        analysis.pictures.append(drawn("Errors of the blocks", path, plot_block_errors, errors, selected or ()))
    return analysis
