"""The README's snippets run as they stand there; long commands run with fewer episodes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from report.report_helpers import write_results

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def snippets(language: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", README, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


def test_python_snippets_run_in_order(tmp_path: Path) -> None:
    code = snippets("python")
    assert len(code) >= 4
    script = tmp_path / "snippets.py"
    script.write_text("\n".join(code))
    done = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "█" in done.stdout


# What makes a command of the README short enough for a test.
SHORTER = {
    "python scripts/collect_lerobot_data.py": " --num_episodes 1 --output_dir {tmp}/lerobot",
    "bash shell/quickstart.sh": " --episodes 1 --latency_calls 2",
    "bacinfer eval": " -o {results} --n_test 1 --latency_calls 1 --skip_video",
    "bacinfer compare": " -o {results} --n_test 1 --latency_calls 1 --methods ddim:10,ddim:4+bac:2:1",
    "bash shell/main/": " --output_dir {results} --n_test 1 --latency_calls 1",
    "bacinfer sweep": " results_dir={results} n_test=1 latency_calls=1 method=ddim:4",
    "python scripts/train_pusht.py task=pusht_image": " training.frames_dir={tmp}/frames",
    "python scripts/train_pusht.py": " --data {tmp}/demos.npz -o {tmp}/run training.num_epochs=1 && ls {tmp}/run",
    "python scripts/train_arm.py": " --data {tmp}/arm.npz -o {tmp}/run task.dataset.num_demonstrations=1"
    " training.num_epochs=1 && ls {tmp}/run",
}


def write_demonstrations(path: Path) -> None:
    """Twenty steps of nothing, in the form of the published demonstrations."""
    steps = 20
    np.savez(
        path,
        action=np.full((steps, 2), 256, np.float32),
        state=np.full((steps, 5), 256, np.float32),
        keypoint=np.full((steps, 9, 2), 256, np.float32),
        episode_ends=np.array([steps]),
    )


def commands() -> list[str]:
    lines = "".join(snippets("bash")).replace("\\\n", "").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


def test_every_kind_of_command_is_there() -> None:
    assert all(any(command.startswith(start) for command in commands()) for start in SHORTER)
    assert "bash shell/test.sh" in commands()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One results table for all commands, so that they evaluate the plain policy once."""
    return tmp_path_factory.mktemp("results")


@pytest.mark.parametrize("command", [c for c in commands() if c != "bash shell/test.sh"])
def test_commands_run(command: str, tmp_path: Path, results: Path) -> None:
    write_demonstrations(tmp_path / "demos.npz")
    for start, flags in SHORTER.items():
        if command.startswith(start):
            command += flags.format(tmp=tmp_path, results=results)
    if "method=" in command:  # (its schedule's numbers are those of BAC)
        command = re.sub(r" num_\w+=\S+", "", command)
    if command.startswith("bacinfer report"):  # of the comparison before it, which ran elsewhere, if it did yet
        command = f"bacinfer report {write_results(tmp_path / 'compare')}"
    environment = {
        **os.environ,
        "BACINFER_VENV": sys.prefix,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    shell = ["bash", "-c", command]
    done = subprocess.run(shell, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout


def test_files_that_the_readme_names_are_there() -> None:
    linked = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert linked
    assert not [path for path in linked if not (ROOT / path).exists()]
