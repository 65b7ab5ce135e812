"""The shell scripts, in whatever environment they are started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(script: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", f"shell/{script}", *flags],
        cwd=ROOT,
        env={**os.environ, "BACINFER_VENV": sys.prefix, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_exported_cdpath_does_not_lead_astray(tmp_path: Path) -> None:
    """`cd shell/get_steps/../..` would go below CDPATH, and print where it went."""
    (tmp_path / "shell" / "get_steps").mkdir(parents=True)
    done = run("get_steps/get_steps_info.sh", "--task=pusht", "--num_caches=10", CDPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cosine, M = 10")


def test_an_environment_that_is_not_there(tmp_path: Path) -> None:
    done = run("get_steps/get_steps_info.sh", "--help", BACINFER_VENV=str(tmp_path / "none"))
    assert done.returncode == 2
    assert f"error: BACINFER_VENV is {tmp_path / 'none'}" in done.stderr
