"""What stands in the place of objects and classes that are not built."""

from __future__ import annotations

from typing import Any


class Record:
    """In the place of an object whose class is not built: what the pickle says of its state, whatever that is."""

    state: Any = None


class Mentioned:
    """In the place of a class that a pickle may mention; it stands for nothing."""


MENTIONED = Mentioned()
