"""The shell scripts, in whatever environment they are started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_an_exported_cdpath_does_not_lead_astray(tmp_path: Path) -> None:
    """`cd shell/get_steps/../..` would go below CDPATH, and print where it went."""
    (tmp_path / "shell" / "get_steps").mkdir(parents=True)
    command = ["bash", "shell/get_steps/get_steps_info.sh", "--task=pusht", "--num_caches=10"]
    environment = {**os.environ, "CDPATH": str(tmp_path), "BACINFER_VENV": sys.prefix}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cosine, M = 10")
