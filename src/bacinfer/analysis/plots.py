"""Pictures: similarity matrices as heat maps, schedules as block × denoising step, block errors as bars."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from bacinfer.analysis.similarity import Array
from bacinfer.core.bubbling import layer_and_kind
from bacinfer.core.schedule import CacheSchedule
from bacinfer.files import atomic_write

DPI = 100
PLAIN_TEXT: dict[Any, Any] = {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "bacinfer"}
"""Settings of matplotlib for a drawing: text as it is, dollar signs included, and the same file each time."""

_SELECTED, _OTHER = "#2b5b84", "#a9bed0"
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_GAP = 0.15  # between heat maps, as a share of their width: room for a caption


@rc_context(PLAIN_TEXT)
def plot_similarities(matrices: Mapping[str, Array], metric: str, *paths: Path) -> None:
    """Draws every block's matrix [K, K], a column of heat maps a layer, each in the range of its own values.

    All heat maps share one set of axes, which is far cheaper to draw than a set for each.

    Args:
        matrices: Block key to its matrix.
        metric: For the title.
        paths: The .png and .svg files to write.
    """
    layers = list(dict.fromkeys(layer_and_kind(block)[0] for block in matrices))
    kinds = list(dict.fromkeys(layer_and_kind(block)[1] for block in matrices))
    column, row = 1 + _GAP, 1 + 2 * _GAP  # heat maps are 1 × 1
    figure = Figure(figsize=(1.1 * len(layers) + 0.9, 1.3 * len(kinds) + 0.8), dpi=DPI)
    axes = _axes(figure, left=0.8, right=0.1, bottom=0.3, top=0.5)
    for block, matrix in matrices.items():
        layer, kind = layer_and_kind(block)
        left, top = layers.index(layer) * column, kinds.index(kind) * row
        axes.imshow(matrix, extent=(left, left + 1, top + 1, top), interpolation="nearest", aspect="auto")
        caption = f"{matrix.min():.3g} … {matrix.max():.3g}"
        axes.text(left + 0.5, top - 0.04, caption, fontsize=6, ha="center", va="bottom")
    axes.set_xlim(0, len(layers) * column)
    axes.set_ylim(len(kinds) * row, -2 * _GAP)
    axes.set_xticks([n * column + 0.5 for n in range(len(layers))], _layer_labels(layers), fontsize=7)
    axes.set_yticks([n * row + 0.5 for n in range(len(kinds))], kinds, fontsize=7)
    axes.tick_params(length=0)
    axes.set_frame_on(False)
    figure.suptitle(f"{metric} between denoising steps, 0 top left (range above each)", fontsize=8)
    save_figure(figure, *paths)


@rc_context(PLAIN_TEXT)
def plot_schedules(schedules: Sequence[CacheSchedule], *paths: Path) -> None:
    """Draws schedules of the same blocks side by side: a row a block, a column a denoising step, dark for an update.

    Args:
        schedules: For instance one for each budget.
        paths: The .png and .svg files to write.
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
    save_figure(figure, *paths)


@rc_context(PLAIN_TEXT)
def plot_block_errors(errors: Mapping[str, float], selected: Collection[str], *paths: Path) -> None:
    """Draws the blocks' errors as bars, those of the selected blocks dark.

    Args:
        errors: Block key to error (see `bacinfer.core.bubbling.block_error`).
        selected: The blocks that bubbling union extends.
        paths: The .png and .svg files to write.
    """
    rows = range(len(errors))
    figure = Figure(figsize=(6.5, 0.17 * len(errors) + 0.8), dpi=DPI)
    axes = _axes(figure, left=1.9, right=0.2, bottom=0.45, top=0.35)
    colours = [_SELECTED if block in selected else _OTHER for block in errors]
    axes.barh(rows, list(errors.values()), height=0.7, color=colours)
    axes.set_yticks(rows, list(errors), fontsize=7)
    axes.set_ylim(len(errors) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_xlabel("error: mean |difference| of the residuals of two steps", fontsize=7)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(f"dark: the {len(selected)} selected for bubbling union" if selected else "", fontsize=8)
    save_figure(figure, *paths)


def save_figure(figure: Figure, *paths: Path) -> None:
    """Writes a figure to .png and .svg files, each at once.

    Raises:
        ValueError: a path ends in something else.
    """
    for path in paths:
        with atomic_write(path) as temporary:
            if path.suffix == ".png":
                FigureCanvasAgg(figure).print_png(str(temporary))
            elif path.suffix == ".svg":
                FigureCanvasSVG(figure).print_svg(str(temporary), metadata=_NO_METADATA)
            else:
                raise ValueError(f"{path}: expected a .png or .svg file")
        figure.set_layout_engine("none")  # it is laid out, which can take as long as drawing it


def _layer_labels(layers: Sequence[str]) -> list[str]:
    """``layer 3`` for ``decoder.layers.3``, unless other layers have that number too, or one has none."""
    numbers = {layer.rpartition(".")[2] for layer in layers}
    if len(numbers) == len(layers) and all(number.isdigit() for number in numbers):
        return [f"layer {layer.rpartition('.')[2]}" for layer in layers]
    return list(layers)


def _axes(figure: Figure, left: float, right: float, bottom: float, top: float) -> Axes:
    """Axes that fill a figure up to margins in inches (an automatic layout would draw everything twice)."""
    width, height = figure.get_size_inches()
    return figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height))
