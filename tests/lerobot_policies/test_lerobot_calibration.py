"""Calibrating LeRobot's policies: by episodes in LeRobot's environments, and from observations where there are none."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("lerobot") is None:
    pytest.skip("needs lerobot, in an environment of its own", allow_module_level=True)

import bacinfer.lerobot
import tiny_lerobot as tiny
from bacinfer import SamplingPlan
from bacinfer.commands.cli import main
from bacinfer.experiments.candidates import default_methods
from bacinfer.lerobot.checkpoint import load_policy

ENV = "pusht,episode_length=8,observation_height=96,observation_width=96"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_pusht_checkpoint(tmp_path_factory.mktemp("lerobot"))


def calibrate(checkpoint: Path, out: Path, *flags: str, env: str = ENV) -> int:
    command = ["calibrate", f"--lerobot={checkpoint}", f"--env={env}", f"--output_dir={out}", "--rounds=2", "--fresh=2"]
    return main([*command, *flags])


def kept_scores(out: Path) -> int:
    return len(list((out / "episodes").glob("*-scores.json")))


def test_the_plan_serves_lerobot(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert calibrate(checkpoint, out, "--methods=own:5,ddim:3") == 0
    assert "after 2 episodes" in capsys.readouterr().out
    found = json.loads((out / "calibration.json").read_text())
    assert {row["name"] for row in found["candidates"]} == {"own:5", "ddim:3"}
    assert found["plain"]["score"]["count"] == 2
    assert (out / "calibration.html").is_file()
    plan = SamplingPlan.load(out / "plan.json")
    policy = bacinfer.lerobot.apply(load_policy(checkpoint), out / "plan.json")
    assert bacinfer.lerobot.summary(policy).sampler == plan.sampler
    assert main(["lerobot", "export", str(checkpoint), str(out / "plan.json"), str(tmp_path / "exported")]) == 0
    assert SamplingPlan.from_json(json.loads((tmp_path / "exported" / "config.json").read_text())["bac_plan"]) == plan

    assert calibrate(checkpoint, out, "--methods=own:5,ddim:3") == 0
    assert kept_scores(out) == 3, "plain and two plans, each once"
    assert calibrate(checkpoint, out, "--methods=own:5,ddim:3", env=f"{ENV},fps=5") == 0
    assert kept_scores(out) == 6, "of another environment"


def test_what_is_tried_fits_the_policy(tmp_path: Path) -> None:
    def tried(policy: Any) -> set[str]:
        return {method.spec for method in default_methods(bacinfer.lerobot.handle(policy), stateful=False)}

    diffusing = tried(tiny.multi_task_dit(tmp_path))
    assert {"own:5", "ddim:5", "dpm:3", "own:10+uniform:5"} <= diffusing
    flowing = tried(tiny.multi_task_dit(tmp_path, objective="flow_matching", integration_method="rk4"))
    assert flowing == {method for method in diffusing if not method.startswith(("ddim", "dpm"))}, "K is 40, in 10 steps"
    assert {"own:5", "own:2"} <= tried(tiny.xvla(tmp_path))


def test_from_observations(tmp_path: Path) -> None:
    policy = tiny.multi_task_dit(tmp_path, num_inference_steps=12)
    seen = [tiny.observation(policy, batch=1, seed=seed) for seed in range(2)]
    found = bacinfer.calibrate(bacinfer.lerobot.handle(policy), None, tmp_path, observations=seen, latency_ms=10_000)
    assert {"own:5", "dpm:3", "own:10+uniform:5"} <= found.distances.keys()
    bacinfer.lerobot.apply(policy, tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stateful"], "a handle names none: calibrate it without stateful"),
        (["--methods=ddim:5+warm:4:2", "--stateful"], "use a plan without a warm start"),
        (["--methods=own:101"], "trained with 100 timesteps, which own:101 exceeds"),
    ],
)
def test_mistakes(
    flags: list[str], message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calibrate(checkpoint, tmp_path, *flags) == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_needs_its_environment(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", f"--lerobot={checkpoint}", f"--output_dir={tmp_path}"]) == 2
    assert "--lerobot and --env go together" in capsys.readouterr().err
