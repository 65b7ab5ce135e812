"""Files that are whole or not there: atomic writes; arrays, text and JSON; checked paths.

Nothing here unpickles anything.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bacinfer.safe_pickle import shorten
from bacinfer.safe_zip import open_zip

_METADATA = "metadata.json"  # the entry of an .npz file that holds its metadata


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary path near `path` to write to; it replaces `path` once the block ends without an exception.

    A full disk or a killed process leaves the old file as it was. Missing directories are made. What killed writers of
    `path` left is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_overs(path)
    with _temporary_directory(path) as directory:
        temporary = directory / path.name
        yield temporary
        os.replace(temporary, path)


# A writer locks the directory that it writes in while it lives: one without a lock was left by a writer that died. The
# lock is not on the file itself, as some writers, such as a linker, replace that.

_PART = ".part"


@contextmanager
def _temporary_directory(path: Path) -> Iterator[Path]:
    """A new directory beside `path`, locked while the block runs."""
    while True:
        directory = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_PART, dir=path.parent))
        lock = lock_directory(directory)
        if directory.is_dir():  # otherwise `_remove_left_overs` of another writer came before the lock
            break
        _unlock(lock)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        _unlock(lock)


def _remove_left_overs(path: Path) -> None:
    for directory in path.parent.glob(f".{glob.escape(path.name)}.{'?' * 8}{_PART}"):
        lock = lock_directory(directory, wait=False)
        if lock is not None:
            shutil.rmtree(directory, ignore_errors=True)
            _unlock(lock)


def lock_directory(directory: Path, *, wait: bool = True) -> int | None:
    """The descriptor that holds the lock of a directory, as long as it is open; None if another holds it, or the
    directory is gone, or its file system has no locks."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


# -- formats --------------------------------------------------------------------------------------------------------


def write_arrays(
    path: str | Path, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any] | None = None
) -> None:
    """Writes named arrays, and metadata that JSON can hold, to one .npz file."""
    entries = {**arrays, _METADATA: np.array(json.dumps(metadata or {}))}
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **entries)  # type: ignore[arg-type]


def read_arrays(path: str | Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The arrays and the metadata that `write_arrays` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or no .npz file of plain arrays.
    """
    path = Path(path)
    try:
        with open_zip(path), np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        metadata = parse_json(str(arrays.pop(_METADATA, "{}")).encode(), path)
        other = [name for name, array in arrays.items() if array.dtype.kind not in "biufc"]
        if other or not isinstance(metadata, dict):
            raise ValueError(f"found {shorten(other[:1] or metadata)} where numbers are expected")
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged archive can raise nearly anything
        raise ValueError(
            f"{path} is not a complete .npz file of plain arrays ({type(error).__name__}: "
            f"{shorten(error)}); delete it and make it again"
        ) from error
    return arrays, metadata


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, data: Any) -> None:
    """Writes data that JSON can hold, for people to read as well: lists of numbers stand in one line."""
    text = json.dumps(data, indent=2)
    text = re.sub(
        r"\[\n[\d,\s]+\]", lambda numbers: " ".join(numbers[0].split()).replace("[ ", "[").replace(" ]", "]"), text
    )
    write_text(path, text + "\n")


def read_json(path: str | Path) -> Any:
    """What `write_json` wrote, or another JSON file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no JSON; names the file and the line.
    """
    return parse_json(Path(path).read_bytes(), Path(path))


def parse_json(text: bytes, path: Path, line: int = 1) -> Any:
    """The JSON in `text`, which stands in a file from a line on; raises ValueError that names both."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {line + error.lineno - 1}: this is no JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {line}: this is no JSON ({error})") from error


def describe(data: Any) -> str:
    """What a file holds where something else was expected."""
    return f"{type(data).__name__} {shorten(data)}"


# -- paths ----------------------------------------------------------------------------------------------------------


def contents(directory: Path) -> str:
    """What is in a directory, as the end of an error message."""
    if not directory.is_dir():
        return "does not exist"
    found = sorted(path.name for path in directory.iterdir())
    return f"holds {', '.join(found[:10])}{', …' if len(found) > 10 else ''}" if found else "is empty"


def check_path(text: str) -> str:
    """The path itself, if every file and table of results can hold it.

    Raises:
        ValueError: it is empty, or has a line break, a NUL or a byte that is no UTF-8.
    """
    if not text:
        raise ValueError("the path is empty; the current directory is '.'")
    if re.search("[\n\r\0\ud800-\udfff]", text):  # (surrogates stand for bytes that are no UTF-8)
        raise ValueError(f"a path may have no line break, no NUL and no byte that is not UTF-8, got {text!r}")
    return text
