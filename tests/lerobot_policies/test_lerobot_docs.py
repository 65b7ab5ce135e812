"""The page about LeRobot's policies runs as it stands there, on a tiny checkpoint and a tiny data set."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("lerobot") is None:
    pytest.skip("needs lerobot, in an environment of its own", allow_module_level=True)

import tiny_lerobot as tiny
from snippets import LEROBOT_PAGE, ROOT, commands, python_of

SHORT_EPISODES = " --env.episode_length=7 --eval.n_episodes=2"
FEW_EPISODES = ",episode_length=7 --methods=own:5 --n_test=2 --n_envs=2 --latency_calls=1"
SMALL = "observation_height=96", "observation_width=96"
SHORTER = {  # (the last of equal flags counts)
    "lerobot-eval --policy.path=outputs/pusht_lerobot_ten": f"{SHORT_EPISODES} --eval.batch_size=2",
    "lerobot-eval --policy.path=outputs/pusht_bac": SHORT_EPISODES + "".join(f" --env.{setting}" for setting in SMALL),
    "bacinfer compare --lerobot assets": f" --env=pusht,obs_type=environment_state_agent_pos{FEW_EPISODES}",
    "bacinfer calibrate": f" --env=pusht,episode_length=7,{','.join(SMALL)} --methods=own:5 --rounds=2 --fresh=2",
    "bacinfer compare --lerobot outputs": f" --env=pusht,{','.join(SMALL)}{FEW_EPISODES}",
}


def test_the_page_from_its_first_to_its_last_line(tmp_path: Path) -> None:
    place = tmp_path / "outputs" / "train" / "pusht" / "checkpoints" / "last"
    place.mkdir(parents=True)
    shutil.copytree(tiny.write_pusht_checkpoint(tmp_path / "made"), place / "pretrained_model")
    tiny.write_pusht_dataset(tmp_path / "data" / "pusht")
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    (tmp_path / "page.py").write_text(python_of(LEROBOT_PAGE))
    lines = [f"{sys.executable} page.py"]
    lines += [
        command + "".join(flags for start, flags in SHORTER.items() if command.startswith(start))
        for command in commands(LEROBOT_PAGE)
    ]
    assert len(lines) == 10
    for line in lines:
        done = subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stderr[-3000:]}"
    assert (tmp_path / "outputs" / "pusht_eval" / "eval_info.json").is_file()
