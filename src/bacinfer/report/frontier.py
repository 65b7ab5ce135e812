"""A calibration as a page: what each plan costs against what it loses."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bacinfer.analysis.plots import PLAIN_TEXT, save_figure
from bacinfer.experiments.calibration import HEADER, Calibration, Candidate, candidate_cells
from bacinfer.files import write_text
from bacinfer.measurement.statistics import CONFIDENCE
from bacinfer.report.pareto import use_cost_axis
from bacinfer.report.sections.shared import drawn
from bacinfer.report.templating import render

PAGE_FILE = "calibration.html"


def write_frontier(calibration: Calibration, output_dir: Path, task: str) -> Path:
    """Writes ``calibration.html``, and its picture beside it as .png and .svg; returns the page's path."""
    html = render(
        "calibration.html",
        title=task,
        calibration=calibration,
        header=HEADER,
        rows=list(map(candidate_cells, [*calibration.candidates, calibration.plain])),
        plan=calibration.plan.to_json(),
        picture=drawn("Frontier", output_dir / "frontier", plot_frontier, calibration),
        confidence=f"{CONFIDENCE:.0%}",
        threads=torch.get_num_threads(),
    )
    page = output_dir / PAGE_FILE
    write_text(page, html)
    return page


@rc_context(PLAIN_TEXT)
def plot_frontier(calibration: Calibration, *paths: Path) -> None:
    """The change of the score against the latency of a call, with 95 % intervals; the frontier is joined."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    judged = [candidate for candidate in calibration.candidates if candidate.difference is not None]
    for number, candidate in enumerate(judged):
        chosen = candidate.name == calibration.chosen.name
        _draw(axes, candidate, "C3" if chosen else "C0", above=number % 2 == 0)
    frontier: list[Candidate] = []
    for candidate in judged:  # the fastest first
        if not frontier or _mean(candidate) > _mean(frontier[-1]):
            frontier.append(candidate)
    axes.plot([1e3 * c.latency for c in frontier], list(map(_mean, frontier)), color="C0", alpha=0.4, linewidth=1)
    axes.axhline(0, color="grey", linewidth=1)
    axes.axhline(-calibration.target.margin, color="grey", linestyle=":", linewidth=1)
    use_cost_axis(axes)
    axes.set_xlabel(f"ms a call, where the plain policy takes {1e3 * calibration.plain.latency:.0f}")
    axes.set_ylabel("difference to the plain policy's score")
    save_figure(figure, *paths)


def _draw(axes: Axes, candidate: Candidate, colour: str, *, above: bool) -> None:
    found = candidate.difference
    assert found is not None
    x = 1e3 * candidate.latency
    error = None if found.low is None or found.high is None else [[found.mean - found.low], [found.high - found.mean]]
    axes.errorbar([x], [found.mean], yerr=error, color=colour, marker="o", markersize=4, capsize=2, elinewidth=0.8)
    offset = (4, 4 if above else -10)
    axes.annotate(
        candidate.name, (x, found.mean), offset, textcoords="offset points", fontsize=7, color=colour, in_layout=False
    )


def _mean(candidate: Candidate) -> float:
    assert candidate.difference is not None
    return candidate.difference.mean
