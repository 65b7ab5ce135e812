"""Reading and writing mp4 files."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from bacinfer.tasks.video import frame_rate, open_video, read_video


def grey(level: int, height: int = 33, width: int = 50) -> np.ndarray:
    return np.full((height, width, 3), level, dtype=np.uint8)


def test_frames_come_back(tmp_path: Path) -> None:
    levels = [20, 120, 220]
    with open_video(tmp_path / "video.mp4") as video:
        for level in levels:
            video.append(grey(level))
    frames = list(read_video(tmp_path / "video.mp4"))
    assert {frame.shape for frame in frames} == {(32, 50, 3)}  # codecs want even sides
    np.testing.assert_allclose([frame.mean() for frame in frames], levels, atol=4)


@pytest.mark.parametrize("fps", [80, Fraction(25, 2)])
def test_speed(tmp_path: Path, fps: int | Fraction) -> None:
    with open_video(tmp_path / "video.mp4", fps) as video:
        for level in range(3):
            video.append(grey(level))
    assert frame_rate(tmp_path / "video.mp4") == fps


def test_no_file_is_left_by_a_failure(tmp_path: Path) -> None:
    def fail() -> None:
        with open_video(tmp_path / "video.mp4") as video:
            video.append(grey(0))
            raise KeyError("simulator")

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_video_without_frames_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one frame"), open_video(tmp_path / "video.mp4"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_missing_video(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.mp4"):
        next(read_video(tmp_path / "none.mp4"))
