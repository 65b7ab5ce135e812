"""The shell scripts, in whatever environment they are started."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("script", sorted(str(path.relative_to(ROOT)) for path in (ROOT / "shell").rglob("*.sh")))
def test_the_syntax(script: str) -> None:
    done = subprocess.run(["bash", "-n", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("arguments", [[], ["/nowhere"], ["src"]])
def test_an_environment_without_its_package_is_refused_before_anything_is_installed(
    arguments: list[str], tmp_path: Path
) -> None:
    venv = tmp_path / "venv"
    done = run("environments/diffusion_policy.sh", *arguments, BACINFER_DIFFUSION_POLICY_VENV=str(venv))
    assert done.returncode == 2
    assert done.stderr.startswith("error: expected a checkout of the diffusion_policy package, found ")
    assert not venv.exists()


def test_emulating_arm_says_what_it_needs() -> None:
    done = run("test_arm.sh", CXX="no-such-compiler -O3")
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no no-such-compiler; on Debian: apt install g++-aarch64-linux-gnu qemu-user" in done.stderr


@pytest.mark.skipif(platform.machine() in ("aarch64", "arm64"), reason="this is ARM")
def test_what_is_checked_on_arm_is_refused_elsewhere(tmp_path: Path) -> None:
    done = run("environments/arm.sh", BACINFER_ARM_VENV=str(tmp_path / "venv"))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: this is a {platform.machine()} processor")
    assert not (tmp_path / "venv").exists()
