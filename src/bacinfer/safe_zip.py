"""Zip archives that hold what they seem to hold: NumPy's .npz and PyTorch's checkpoints."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bacinfer.safe_pickle import memory_limit


@contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """An archive whose entries, all of them together, take no more memory than a file of its size may.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no zip archive, or its entries could be larger. A damaged one makes ``zipfile`` raise nearly
            anything, here or when an entry is read.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(f"no zip archive ({path.stat().st_size} bytes): it is cut short, or another kind of file")
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > memory_limit(path.stat().st_size):
            raise ValueError("its entries are far larger than the file: it was put together to unfold")
        yield archive
