"""Pictures: similarity matrices as heat maps, schedules as block × denoising step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bacinfer.analysis.similarity_metrics import Array
from bacinfer.assets import atomic_write
from bacinfer.core.bubbling import split_block_key
from bacinfer.core.schedule import CacheSchedule

DPI = 100
_GAP = 0.15  # between heat maps, as a share of their width: room for a caption


def plot_similarities(matrices: Mapping[str, Array], metric: str, path: Path) -> None:
    """Draws every block's matrix [K, K], a column of heat maps a layer, each in the range of its own values.

    All heat maps share one set of axes, which is far cheaper to draw than a set for each.

    Args:
        matrices: Block key to its matrix.
        metric: For the title.
        path: The PNG to write.
    """
    layers = sorted({split_block_key(block)[0] for block in matrices})
    kinds = list(dict.fromkeys(split_block_key(block)[1] for block in matrices))
    column, row = 1 + _GAP, 1 + 2 * _GAP  # heat maps are 1 × 1
    figure = Figure(figsize=(1.1 * len(layers) + 0.9, 1.3 * len(kinds) + 0.8), dpi=DPI)
    axes = _axes(figure, left=0.8, right=0.1, bottom=0.3, top=0.5)
    for block, matrix in matrices.items():
        layer, kind = split_block_key(block)
        left, top = layers.index(layer) * column, kinds.index(kind) * row
        axes.imshow(matrix, extent=(left, left + 1, top + 1, top), interpolation="nearest", aspect="auto")
        caption = f"{matrix.min():.3g} … {matrix.max():.3g}"
        axes.text(left + 0.5, top - 0.04, caption, fontsize=6, ha="center", va="bottom")
    axes.set_xlim(0, len(layers) * column)
    axes.set_ylim(len(kinds) * row, -2 * _GAP)
    axes.set_xticks([n * column + 0.5 for n in range(len(layers))], [f"layer {n}" for n in layers], fontsize=7)
    axes.set_yticks([n * row + 0.5 for n in range(len(kinds))], kinds, fontsize=7)
    axes.tick_params(length=0)
    axes.set_frame_on(False)
    figure.suptitle(f"{metric} between denoising steps, 0 top left (range above each)", fontsize=8)
    _save(figure, path)


def plot_schedules(schedules: Sequence[CacheSchedule], path: Path) -> None:
    """Draws schedules of the same blocks side by side: a row a block, a column a denoising step, dark for an update.

    Args:
        schedules: For instance one for each budget.
        path: The PNG to write.
    """
    blocks = list(schedules[0].update_steps)
    figure = Figure(figsize=(3.2 * len(schedules) + 1.5, 0.15 * len(blocks) + 0.8), dpi=DPI)
    axes = _axes(figure, left=1.4, right=0.1, bottom=0.45, top=0.35)
    for n, schedule in enumerate(schedules):
        image = [schedule.update_mask(block) for block in blocks]
        axes.imshow(
            image,
            extent=(n, n + 0.97, len(blocks), 0),
            cmap="Blues",
            vmin=0,
            vmax=1,
            interpolation="nearest",
            aspect="auto",
        )
        axes.text(n + 0.485, -0.4, schedule.label, fontsize=7, ha="center")
    last_steps = [schedule.num_inference_steps - 1 for schedule in schedules]
    ends = [x for n in range(len(schedules)) for x in (n + 0.03, n + 0.94)]
    axes.set_xticks(ends, [str(step) for last in last_steps for step in (0, last)], fontsize=6)
    axes.set_xlim(0, len(schedules))
    axes.set_ylim(len(blocks), 0)
    axes.set_yticks([n + 0.5 for n in range(len(blocks))], blocks, fontsize=6)
    axes.set_xlabel("denoising step (0: noisiest)", fontsize=7)
    axes.tick_params(length=0)
    axes.set_frame_on(False)
    _save(figure, path)


def _axes(figure: Figure, left: float, right: float, bottom: float, top: float) -> Axes:
    """Axes that fill a figure up to margins in inches (an automatic layout would draw everything twice)."""
    width, height = figure.get_size_inches()
    return figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height))


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))
