"""Pictures: what they show where."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from bacinfer.analysis.plots import plot_block_errors, plot_schedules, plot_similarities
from bacinfer.core.schedule import CacheSchedule

BLOCKS = [f"decoder.layers.{layer}_{kind}" for layer in range(3) for kind in ("sa_block", "mha_block", "ff_block")]


def share_of_dark_blue(path: Path) -> float:
    """The share of pixels in the colour of an update."""
    pixels = imread(path)[..., :3]
    return float((np.abs(pixels - np.array([8, 48, 107]) / 255).max(axis=-1) < 0.02).mean())


def test_a_schedule_is_dark_where_it_updates(tmp_path: Path) -> None:
    def picture(name: str, num_updates: int) -> float:
        path = tmp_path / f"{name}.png"
        plot_schedules([CacheSchedule.unified(BLOCKS, 20, range(num_updates))], path)
        return share_of_dark_blue(path)

    one, four, all_steps = picture("one", 1), picture("four", 4), picture("all", 20)
    assert 3.5 < four / one < 4.5
    assert 18 < all_steps / one < 22


def test_several_schedules_stand_side_by_side(tmp_path: Path) -> None:
    schedule = CacheSchedule.periodic(BLOCKS, 20, 5)
    plot_schedules([schedule], tmp_path / "one.png")
    plot_schedules([schedule] * 3, tmp_path / "three.png")
    one, three = imread(tmp_path / "one.png"), imread(tmp_path / "three.png")
    assert one.shape[0] == three.shape[0]
    assert 2 < three.shape[1] / one.shape[1] < 3


def test_heat_maps_show_each_block_in_its_own_range(tmp_path: Path) -> None:
    """Blocks that differ by a factor only look alike: with one, or with all nine of them scaled, the same colours."""
    matrix = np.abs(np.subtract.outer(np.arange(50.0), np.arange(50.0)))
    plot_similarities(dict.fromkeys(BLOCKS, matrix), "l1", tmp_path / "equal.png")
    scaled = {block: (1 + n) * matrix for n, block in enumerate(BLOCKS)}
    plot_similarities(scaled, "l1", tmp_path / "scaled.png")
    equal, scaled_image = imread(tmp_path / "equal.png"), imread(tmp_path / "scaled.png")
    coloured = np.ptp(equal[..., :3], axis=-1) > 0.1
    assert coloured.mean() > 0.3
    np.testing.assert_allclose(equal[coloured], scaled_image[coloured], atol=0.02)


def test_selected_blocks_have_dark_bars(tmp_path: Path) -> None:
    errors = dict.fromkeys(BLOCKS, 1.0)

    def share_of_dark_bars(selected: list[str]) -> float:
        plot_block_errors(errors, selected, tmp_path / "errors.png")
        pixels = imread(tmp_path / "errors.png")[..., :3]
        return float((np.abs(pixels - np.array([0x2B, 0x5B, 0x84]) / 255).max(axis=-1) < 0.02).mean())

    one, three = share_of_dark_bars(BLOCKS[:1]), share_of_dark_bars(BLOCKS[2:5])
    assert share_of_dark_bars([]) == 0
    assert 2.5 < three / one < 3.5


def test_text_in_an_svg_is_text_as_it_is(tmp_path: Path) -> None:
    plot_schedules([CacheSchedule.periodic(BLOCKS, 20, 5)], tmp_path / "a.svg")
    schedule = CacheSchedule.unified(BLOCKS, 20, [0], label="$x_$ <b>")
    plot_schedules([schedule], tmp_path / "b.svg", tmp_path / "b.png")
    assert "threshold 5</text>" in (tmp_path / "a.svg").read_text()
    assert "$x_$ &lt;b&gt;</text>" in (tmp_path / "b.svg").read_text()
    assert (tmp_path / "b.png").is_file()


def test_other_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a \.png or \.svg"):
        plot_block_errors({BLOCKS[0]: 1.0}, [], tmp_path / "a.jpg")
    assert list(tmp_path.iterdir()) == []
