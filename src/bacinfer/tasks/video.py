"""Writing and reading mp4 files through PyAV (extra ``[sim]`` or ``[arm]``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bacinfer.files import atomic_write

Frame = NDArray[np.uint8]
"""[height, width, 3], RGB."""

FPS = 10


class VideoWriter:
    """Takes frames one by one, so that no episode has to lie in memory."""

    def __init__(self, container: Any, fps: int | Fraction) -> None:
        self._container = container
        self._fps = fps
        self._stream: Any = None

    def append(self, frame: Frame) -> None:
        av = import_av()
        if self._stream is None:
            codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
            self._stream = self._container.add_stream(codec, rate=Fraction(self._fps))
            # yuv420p halves the colour planes: both sides have to be even
            height, width = frame.shape[0] // 2 * 2, frame.shape[1] // 2 * 2
            self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, "yuv420p"
        frame = np.ascontiguousarray(frame[: self._stream.height, : self._stream.width])
        self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))

    def finish(self) -> None:
        if self._stream is None:
            raise ValueError("a video needs at least one frame")
        self._container.mux(self._stream.encode())


@contextmanager
def open_video(path: str | Path, fps: int | Fraction = FPS) -> Iterator[VideoWriter]:
    """A writer of `path` (H.264, or MPEG-4 without libx264); the file appears when the block ends."""
    av = import_av()
    with atomic_write(path) as temporary, av.open(str(temporary), mode="w", format="mp4") as container:
        writer = VideoWriter(container, fps)
        yield writer
        writer.finish()


def read_video(path: str | Path) -> Iterator[Frame]:
    """The frames of a video, one by one.

    Raises:
        FileNotFoundError: no such file.
    """
    with _opened(path) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


def frame_rate(path: str | Path) -> Fraction:
    """Frames a second of a video: 25/2 in the kitchen, for instance.

    Raises:
        FileNotFoundError: no such file.
    """
    with _opened(path) as container:
        return container.streams.video[0].average_rate


def _opened(path: str | Path) -> Any:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no video at {path}")
    return import_av().open(str(path))


def import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise RuntimeError("videos need PyAV: pip install av") from error
    return av
