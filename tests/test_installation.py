"""What an installed package has with it, and where it refuses to run."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import bacinfer
from bacinfer import _installation
from bacinfer.commands.demo import SHIPPED_CHECKPOINT, build_parser

ROOT = Path(__file__).parents[1]


def test_the_version_is_that_of_the_installation() -> None:
    assert bacinfer.__version__ == importlib.metadata.version("bacinfer")


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_linux_and_macos_are_supported(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    importlib.reload(_installation)


def test_windows_is_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(ImportError, match="bacinfer runs on Linux and macOS, and was never tested on Windows"):
        importlib.reload(_installation)


def test_windows_is_refused_before_anything_else_is_imported() -> None:
    code = """
import sys
sys.platform = "win32"
try:
    import bacinfer
except ImportError as error:
    print(error, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("bacinfer runs on Linux and macOS")
    assert done.stdout.endswith("False\n")


def test_the_demo_has_its_policy_wherever_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert build_parser().parse_args([]).checkpoint == SHIPPED_CHECKPOINT
    assert SHIPPED_CHECKPOINT.read_bytes() == (ROOT / "assets" / "pusht" / "pusht_transformer.ckpt").read_bytes()
    in_package = SHIPPED_CHECKPOINT.relative_to(ROOT / "src" / "bacinfer")
    assert f'"{in_package}"' in (ROOT / "pyproject.toml").read_text()  # package-data
