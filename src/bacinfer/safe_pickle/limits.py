"""What is refused: errors, the memory that reading may take, and checks of what a pickle says."""

from __future__ import annotations

from typing import Any

# What reading may take in memory. Genuine files take their own size (more where weights are deflated, or have several
# names), and a little for each object.
_GROWTH = 8  # times the file's size
_LEAST_LIMIT = 2**25
OBJECT = 32  # bytes: an instruction, or an object that is found again
CALL = 1024  # bytes: what a call makes, besides the data that it is given


class UnsafePickleError(ValueError):
    """A pickle asks for something that was not admitted."""


class DamagedPickleError(ValueError):
    """A pickle ends early or contradicts itself."""


class Budget:
    """Memory that is left for what a file asks for, in bytes."""

    def __init__(self, limit: int) -> None:
        self.left = limit

    def spend(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise UnsafePickleError("it unfolds into far more than its size")


def memory_limit(size: int) -> int:
    """The bytes of memory that a file of `size` bytes may take."""
    return max(_LEAST_LIMIT, _GROWTH * size)


def require(condition: bool, what: str) -> None:
    if not condition:
        raise UnsafePickleError(f"it has {what}")


def is_size(size: Any) -> bool:
    return type(size) is int and size >= 0


def are_sizes(sizes: Any) -> bool:
    """Whether this is a shape, or strides."""
    return isinstance(sizes, tuple) and all(map(is_size, sizes))


def shorten(text: object) -> str:
    """What a file says, for an error message: a file may say anything, at any length."""
    text = str(text)
    return text if len(text) <= 200 and text.isprintable() else f"{text[:200]!r}…"
