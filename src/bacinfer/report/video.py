"""Policies on the same episode, side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bacinfer.experiments.run_files import SCORES_FILE
from bacinfer.experiments.store import Row
from bacinfer.tasks.video import Frame, frame_rate, open_video, read_video

CAPTION_HEIGHT = 32


def write_side_by_side(output: str | Path, results_dir: str | Path, rows: Sequence[Row]) -> Path:
    """The first episodes of several runs next to each other, each under its method and score; returns `output`.

    Raises:
        FileNotFoundError: an episode was not filmed.
    """
    videos = dict(film(results_dir, row) for row in rows)
    return side_by_side(output, videos)


def film(results_dir: str | Path, row: Row) -> tuple[str, Path]:
    """A caption, the method and its score, and the video of a run's first episode.

    Raises:
        FileNotFoundError: the episode was not filmed.
    """
    directory = Path(results_dir) / row.directory
    video = directory / "media" / f"{row.first_episode_seed}.mp4"
    if not video.is_file():
        raise FileNotFoundError(
            f"{row.label} was evaluated without a film, there is no {video}: pass --force to evaluate it again"
        )
    score = json.loads((directory / SCORES_FILE).read_text())["scores"].get(str(row.first_episode_seed))
    return (row.label if score is None else f"{row.label}: score {score:.2f}"), video


def side_by_side(output: str | Path, videos: Mapping[str, str | Path]) -> Path:
    """Writes one video of several, each below its caption; the shorter ones hold their last frame. Returns `output`.

    It plays at the speed of the first.

    Raises:
        FileNotFoundError: a video is missing.
        ValueError: their frames differ in size.
    """
    output = Path(output)
    headings: list[Frame] | None = None
    with open_video(output, frame_rate(next(iter(videos.values())))) as video:
        for frames in _hold_last([read_video(path) for path in videos.values()]):
            sizes = {frame.shape for frame in frames}
            if len(sizes) > 1:
                raise ValueError(f"the frames of {', '.join(map(str, videos.values()))} differ in size: {sizes}")
            headings = headings or [_heading(caption, frames[0].shape[1]) for caption in videos]
            video.append(np.hstack([np.vstack(pair) for pair in zip(headings, frames, strict=True)]))
    return output


def _hold_last(videos: Sequence[Iterator[Frame]]) -> Iterator[list[Frame]]:
    last: list[Frame] = []
    for frames in zip_longest(*videos):
        last = [last[i] if frame is None else frame for i, frame in enumerate(frames)]
        yield last


def _heading(text: str, width: int) -> Frame:
    image = Image.new("RGB", (width, CAPTION_HEIGHT), "white")
    ImageDraw.Draw(image).text(
        (width / 2, CAPTION_HEIGHT / 2), text, fill="black", anchor="mm", font=ImageFont.load_default(size=16)
    )
    return np.asarray(image)
