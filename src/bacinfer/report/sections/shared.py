"""What the sections of a report share: pictures, names of files, and notes in the place of what is missing."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bacinfer.assets import RunAssets
from bacinfer.core.sampler import KINDS
from bacinfer.experiments.store import Row

T = TypeVar("T")
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Picture:
    """An SVG, and the files that it is in."""

    title: str
    svg: str
    files: list[Path]


def assets_of(row: Row, results_dir: Path) -> RunAssets:
    """The assets directory of a row, which is relative to the results where it lies in there."""
    inside = results_dir / (row.assets or "")
    return RunAssets(inside if inside.is_dir() else Path(row.assets or ""))


def read_or_note(missing: list[str], read: Callable[..., T], *args: Any) -> T | None:
    """What `read` returns; None, and a note in `missing`, if that is missing or damaged."""
    try:
        return read(*args)
    except (OSError, ValueError) as error:
        if str(error) not in missing:
            missing.append(str(error))
        return None


def grouped(items: Iterable[T], key: Callable[[T], Key]) -> dict[Key, list[T]]:
    """In the order in which the keys appear."""
    groups: dict[Key, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def drawn(title: str, path: Path, plot: Callable[..., None], *args: Any) -> Picture:
    """What `plot` draws of its arguments, into a .png and an .svg; `path` is without suffix."""
    files = [path.with_suffix(".png"), path.with_suffix(".svg")]
    plot(*args, *files)
    svg = files[1].read_text(encoding="utf-8")
    return Picture(title, svg[svg.index("<svg") :], files)


def slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-")


def sampler(row: Row) -> str:
    """``ddim:16``, or nothing for the policy's own K steps."""
    match = re.match(rf"(?:{'|'.join(KINDS)}):[^+]+", row.method)
    return match[0] if match else ""
