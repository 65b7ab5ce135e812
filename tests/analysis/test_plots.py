"""Pictures: what they show where."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.image import imread

from bacinfer.analysis.plots import plot_schedules, plot_similarities
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
