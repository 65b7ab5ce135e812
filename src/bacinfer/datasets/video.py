"""The videos of a LeRobot data set: AV1 with lerobot's own settings (extra ``[lerobot]``)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ENCODER = "libsvtav1"
ENCODER_OPTIONS = {"preset": "12", "crf": "30", "g": "2", "svtav1-params": "lp=1"}  # lerobot's, but for one thread
MIN_FRAME_SIZE = 64  # of the encoder
CODEC, PIXEL_FORMAT = "av1", "yuv420p"


class CameraEncoder:
    """Encodes a camera's frames as they come, and counts their pixel values.

    Attributes:
        histogram: how often each of the 256 values occurs in each channel, [3, 256].
        num_frames: how many frames there are.
    """

    def __init__(self, path: Path, fps: int, height: int, width: int) -> None:
        self.histogram = np.zeros((3, 256), dtype=np.int64)
        self.num_frames = 0
        self._time_base = Fraction(1, fps)
        os.environ.setdefault("SVT_LOG", "0")  # the encoder reports every video on stderr otherwise
        self._container: Any = import_av().open(str(path), mode="w")
        self._stream = self._container.add_stream(ENCODER, rate=fps, options=ENCODER_OPTIONS)
        self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, PIXEL_FORMAT

    def append(self, image: NDArray[np.uint8]) -> None:
        """Adds a frame [height, width, 3]."""
        frame = import_av().VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        frame.pts, frame.time_base = self.num_frames, self._time_base
        self._container.mux(self._stream.encode(frame))
        self.num_frames += 1
        for channel in range(3):
            self.histogram[channel] += np.bincount(image[..., channel].ravel(), minlength=256)

    def finish(self) -> None:
        """Writes what the encoder still holds, and closes the file."""
        container, self._container = self._container, None
        if container is not None:
            with container:
                if self.num_frames:
                    container.mux(self._stream.encode())


def concatenate_videos(videos: Iterable[tuple[Path, int]], output: Path, fps: int) -> None:
    """One video of several, given with their numbers of frames, without encoding them again.

    Raises:
        OSError: a video lacks frames.
    """
    av = import_av()
    frames_before = 0
    with av.open(str(output), mode="w", options={"movflags": "faststart"}) as target:
        stream = None
        for path, num_frames in videos:
            with av.open(str(path)) as source:
                video = source.streams.video[0]
                if stream is None:
                    stream = target.add_stream_from_template(video, opaque=True)
                    stream.time_base = video.time_base
                packets = [packet for packet in source.demux(video) if packet.dts is not None]
                if len(packets) != num_frames:
                    raise OSError(f"{path} has {len(packets)} of its {num_frames} frames; is the disk full?")
                offset = int(Fraction(frames_before, fps) / video.time_base)
                for packet in packets:
                    packet.pts += offset
                    packet.dts += offset
                    packet.stream = stream
                    target.mux(packet)
            frames_before += num_frames


def import_av() -> Any:
    """The module `av`; raises RuntimeError where it or its AV1 encoder is missing."""
    try:
        import av
    except ImportError as error:
        raise RuntimeError("LeRobot data sets need PyAV: pip install 'bacinfer[lerobot]'") from error
    if ENCODER not in av.codecs_available:
        raise RuntimeError(f"this PyAV ({av.__version__}) has no AV1 encoder {ENCODER}: pip install --upgrade av")
    return av
