"""The Pareto picture: what methods cost against what they do to score and actions."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from bacinfer.analysis.plots import PLAIN_TEXT, save_figure
from bacinfer.experiments.store import Row
from bacinfer.report.table import episodes_text

_QUALITIES = {"score": "mean score", "action_error": "RMS action error, normalised"}
_MAX_NAMED = 60  # of more methods than these the numbers cannot be read, and take a minute to draw
_NUMBER = r"(?:BU )?\b\d+"


@rc_context(PLAIN_TEXT)
def plot_pareto(rows: Sequence[Row], *paths: Path) -> None:
    """Mean score and action error against latency and FLOPs, with 95 % intervals; the methods of a kind are joined.

    Args:
        rows: Of one checkpoint.
        paths: The .png and .svg files to write.
    """
    first = rows[0]
    plain_latency = 1e3 * first.plain_latency_p50
    costs: dict[str, Callable[[Row], float]] = {
        # a machine's load changes between the rows: what holds is each one's ratio to the plain policy
        f"latency of one call, ms, where the plain policy takes {plain_latency:.0f}": lambda row: (
            plain_latency / row.speedup
        ),
        "GFLOPs of one call": lambda row: row.flops / 1e9,
    }
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    for line, (quality, quality_label) in zip(panels, _QUALITIES.items(), strict=True):
        line[0].set_ylabel(quality_label)
        for axes, cost in zip(line, costs.values(), strict=True):
            _plot(axes, rows, cost, quality)
            use_cost_axis(axes)
            axes.margins(x=0.12)
    scores = [row.score for row in rows if row.score is not None]
    if scores and min(scores) >= 0 and max(scores) <= 1:
        low, high = panels[0, 0].get_ylim()
        panels[0, 0].set_ylim(max(low, -0.02), min(high, 1.02))
    for axes, label in zip(panels[1], costs, strict=True):
        axes.set_xlabel(label)
        axes.axhline(first.noise_error, color="grey", linestyle=":", linewidth=1)
        at = (0.02, first.noise_error)
        text = "two draws of the plain policy's noise"
        axes.annotate(text, at, xycoords=("axes fraction", "data"), va="bottom", fontsize=7, color="grey")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
    episodes = f"{first.task}, {episodes_text(first)}"
    figure.supxlabel(f"{episodes}; {first.hardware}, {first.threads} threads", fontsize=8)
    save_figure(figure, *paths)


def use_cost_axis(axes: Axes) -> None:
    """Costs from left to right, whose ratios count."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)


def kind(row: Row) -> str:
    """A method's label without its numbers; methods of one kind differ in those alone."""
    return re.sub(rf",? ?{_NUMBER}", "", row.label).strip()


def _plot(axes: Axes, rows: Sequence[Row], cost: Callable[[Row], float], quality: str) -> None:
    kinds = sorted({kind(row) for row in rows})  # one colour in all panels
    shown = sorted((row for row in rows if getattr(row, quality) is not None), key=cost)
    for index, name in enumerate(kinds):
        methods = [row for row in shown if kind(row) == name]
        x = [cost(row) for row in methods]
        y = [getattr(row, quality) for row in methods]
        colour = f"C{index}"
        style: dict[str, Any] = {
            "marker": "os^Dv*PX"[index % 8],
            "markersize": 6,
            "capsize": 2,
            "linewidth": 1,
            "elinewidth": 0.8,
        }
        intervals = [_interval(row, quality) for row in methods]
        axes.errorbar(x, y, yerr=list(zip(*intervals, strict=True)) or None, label=name, color=colour, **style)
        if len(rows) > _MAX_NAMED:
            continue
        for row, point in zip(methods, zip(x, y, strict=True), strict=True):
            numbers = ", ".join(re.findall(_NUMBER, row.label)) or row.label
            label: dict[str, Any] = {"fontsize": 7, "color": colour, "in_layout": False}
            axes.annotate(numbers, point, (5, 4), textcoords="offset points", **label)


def _interval(row: Row, quality: str) -> tuple[float, float]:
    """How far the 95 % interval reaches below and above a value; 0 where there is none."""
    value, low, high = getattr(row, quality), getattr(row, f"{quality}_low"), getattr(row, f"{quality}_high")
    return (0, 0) if low is None else (value - low, high - value)
