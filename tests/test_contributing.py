"""CONTRIBUTING.md shows the house as it is."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def load_script(name: str):  # type: ignore[no-untyped-def]
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_of_the_imports_is_true() -> None:
    drawing = load_script("draw_house")
    assert drawing.BLOCK.search(TEXT)[0] == drawing.picture(), "run python scripts/draw_house.py"


def test_arrows_that_follow_from_others_are_left_out() -> None:
    drawing = load_script("draw_house")
    arrows = {("a", "b"), ("b", "c"), ("a", "c"), ("a", "d")}
    assert drawing.without_those_that_follow(arrows) == {("a", "b"), ("b", "c"), ("a", "d")}


def test_every_folder_is_in_the_table() -> None:
    folders = {path.name for path in (ROOT / "src" / "bacinfer").iterdir() if (path / "__init__.py").is_file()}
    assert set(re.findall(r"^\| `(\w+)/` ", TEXT, re.MULTILINE)) == folders


def test_files_that_it_names_are_there() -> None:
    named = re.findall(
        r"`((?:src/bacinfer/|core/|analysis/|experiments/|tasks/|training/|tests/|scripts/|shell/)[\w/.]+)`", TEXT
    )
    assert named
    roots = (ROOT, ROOT / "src" / "bacinfer")
    assert not [path for path in named if not any((root / path).exists() for root in roots)]
