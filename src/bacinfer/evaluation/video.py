"""Policies on the same episode, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bacinfer.evaluation.comparison import Result
from bacinfer.tasks.video import Frame, open_video, read_video

CAPTION_HEIGHT = 32


def write_side_by_side(output: str | Path, results: Mapping[str, Result], seed: int) -> Path:
    """A seed's videos of several policies next to each other, each under its name and score; returns `output`.

    Raises:
        ValueError: a policy's episode of this seed was not filmed.
    """
    videos = {}
    for name, result in results.items():
        if seed not in result.rollout.videos:
            raise ValueError(f"no video of seed {seed} for {name}: there are those of {list(result.rollout.videos)}")
        score = result.rollout.scores.get(seed)
        videos[name if score is None else f"{name}: score {score:.2f}"] = result.rollout.videos[seed]
    return side_by_side(output, videos)


def side_by_side(output: str | Path, videos: Mapping[str, str | Path]) -> Path:
    """Writes one video of several, each below its caption; the shorter ones hold their last frame. Returns `output`.

    Raises:
        FileNotFoundError: a video is missing.
        ValueError: their frames differ in size.
    """
    output = Path(output)
    headings: list[Frame] | None = None
    with open_video(output) as video:
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
