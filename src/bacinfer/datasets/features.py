"""What the frames of a LeRobot data set hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bacinfer.datasets.video import MIN_FRAME_SIZE


@dataclass(frozen=True)
class Feature:
    """What a frame holds under a key.

    Attributes:
        dtype: a NumPy type (``float32``, ``int64``, ``bool``), or ``video`` for a camera.
        shape: ``(n,)``; of a camera ``(height, width, 3)``.
        names: a name for each entry, if they have any.

    Raises:
        ValueError: a shape that the format or the video encoder cannot hold.
    """

    dtype: str
    shape: tuple[int, ...]
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.is_video:
            if len(self.shape) != 1 or self.shape[0] < 1:
                raise ValueError(f"a feature of numbers has a shape (n,), got {self.shape}")
        elif len(self.shape) != 3 or self.shape[2] != 3 or any(n % 2 or n < MIN_FRAME_SIZE for n in self.shape[:2]):
            raise ValueError(
                f"a camera's shape is (height, width, 3), both sides even and at least {MIN_FRAME_SIZE}, "
                f"got {self.shape}"
            )

    @classmethod
    def camera(cls, height: int, width: int) -> Feature:
        return cls("video", (height, width, 3), ("height", "width", "channels"))

    @property
    def is_video(self) -> bool:
        return self.dtype == "video"

    def array(self, key: str, value: Any) -> NDArray[Any]:
        """`value` as an array of this shape and type; raises ValueError where it is of another."""
        array = np.atleast_1d(np.asarray(value))
        dtype = np.dtype(np.uint8 if self.is_video else self.dtype)
        if array.shape != self.shape or not np.can_cast(array.dtype, dtype, "equiv" if self.is_video else "same_kind"):
            raise ValueError(f"{key}: expected {dtype} of shape {self.shape}, got {array.dtype} of shape {array.shape}")
        return array.astype(dtype)


INDEX_FEATURES = {
    "timestamp": Feature("float32", (1,)),
    "frame_index": Feature("int64", (1,)),
    "episode_index": Feature("int64", (1,)),
    "index": Feature("int64", (1,)),
    "task_index": Feature("int64", (1,)),
}
"""What the format adds to every frame: seconds and frames since the episode's start, the episode, the frame's place
among all frames, the task."""
