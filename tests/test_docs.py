"""What the README and the pages of the site show runs as it stands there; long commands run with fewer episodes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bacinfer
from report.report_helpers import write_results
from snippets import LEROBOT_PAGE, PAGES, README, ROOT, commands, links, python_of

ALL = [README, *PAGES]
RUN_HERE = [page for page in ALL if page != LEROBOT_PAGE]
SITE = (ROOT / "mkdocs.yml").read_text()


@pytest.mark.parametrize("page", [page for page in RUN_HERE if python_of(page)], ids=lambda page: page.stem)
def test_python_of_a_page_runs_in_order(page: Path, tmp_path: Path) -> None:
    for name in ("assets", "src"):  # so that what it writes goes elsewhere
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "snippets.py").write_text(python_of(page))
    done = subprocess.run([sys.executable, "snippets.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# What makes a command of the pages short enough for a test.
SHORTER = {
    "python scripts/collect_lerobot_data.py": " --num_episodes 1 --output_dir {tmp}/lerobot",
    "bash shell/quickstart.sh": " --episodes 1 --latency_calls 2",
    "bacinfer eval": " -o {results} --n_test 1 --latency_calls 1 --skip_video",
    "bacinfer compare": " -o {results} --n_test 1 --latency_calls 1 --methods ddim:10,bac:5:1",
    "bacinfer calibrate": " -o {tmp}/calibration --methods own:2,ddim:2 --rounds 2 --fresh 2",
    "bash shell/main/": " --output_dir {results} --n_test 1 --latency_calls 1",
    "bacinfer sweep": " results_dir={results} n_test=1 latency_calls=1 method=ddim:4",
    "bacinfer train task=pusht_image": " --data {tmp}/demos.npz -o {tmp}/run training.num_epochs=1"
    " training.frames_dir={tmp}/frames && ls {tmp}/run",
    "bacinfer train -o": " --data {tmp}/demos.npz -o {tmp}/run training.num_epochs=1 && ls {tmp}/run",
    "bacinfer train task=pick_place": " --data {tmp}/arm.npz -o {tmp}/run task.dataset.num_demonstrations=1"
    " training.num_epochs=1 && ls {tmp}/run",
}
# What the whole suite is, or installs environments of its own.
NOT_RUN = ("bash shell/test.sh", "bash shell/test_oldest.sh")

COMMANDS = list(dict.fromkeys(command for page in RUN_HERE for command in commands(page)))


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


def test_every_kind_of_command_is_shown() -> None:
    assert all(any(command.startswith(start) for command in COMMANDS) for start in SHORTER)
    assert {"bash shell/quickstart.sh", "bash shell/test.sh"} <= set(commands(README))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One results directory for all commands, so that they evaluate the plain policy once."""
    return tmp_path_factory.mktemp("results")


@pytest.mark.parametrize(
    "command",
    [command for command in COMMANDS if not command.startswith(NOT_RUN)],
    ids=lambda command: " ".join(command.split()[:3]),
)
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


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.stem)
def test_linked_files_are_there(page: Path) -> None:
    assert not [path for path in links(page) if not (page.parent / path).exists()]


def test_the_site_has_all_pages_and_nothing_else() -> None:
    listed = {ROOT / "docs" / path for path in re.findall(r"^ +- [^:\n]+: (\S+\.md)$", SITE, re.MULTILINE)}
    assert listed == set((ROOT / "docs").rglob("*.md")) | {ROOT / "docs" / "reference/comparison/comparison.md"}


def test_the_api_page_has_the_whole_door_and_nothing_else() -> None:
    page = (ROOT / "docs" / "reference" / "api.md").read_text()
    names = re.findall(r"^::: bacinfer\.(\w+)$", page, re.MULTILINE)
    assert sorted(names) == sorted(set(bacinfer.__all__) - {"__version__"})
