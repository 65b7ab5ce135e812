"""The Push-T policy that is shipped as LeRobot's checkpoint, what it observes, and the script that trained it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

if importlib.util.find_spec("lerobot") is None:
    pytest.skip("needs lerobot, in an environment of its own", allow_module_level=True)

from gym_pusht.envs import PushTEnv
from lerobot.configs.types import FeatureType, PipelineFeatureType, PolicyFeature
from lerobot.utils.constants import ACTION, OBS_ENV_STATE, OBS_STATE

import bacinfer
from bacinfer.lerobot.checkpoint import load_policy, load_processors
from bacinfer.lerobot.environment import load_subject
from bacinfer.lerobot.state_processor import AppendEnvironmentState

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "train_lerobot_pusht.py"
ENV = "pusht,obs_type=environment_state_agent_pos"

FIRST_ACTIONS = {
    "assets/pusht_lerobot": [
        [101.803, 110.232],
        [106.555, 97.584],
        [119.360, 84.763],
        [133.528, 82.229],
        [147.616, 82.963],
        [163.372, 84.504],
        [176.761, 88.774],
        [186.111, 94.092],
    ],
    "assets/pusht_lerobot_flow": [
        [128.673, 79.933],
        [144.665, 79.087],
        [158.512, 74.912],
        [173.505, 80.521],
        [187.202, 90.987],
        [200.216, 100.648],
        [213.915, 106.339],
        [223.383, 111.445],
    ],
}
"""The chunk of episode 100000's first call with noise of seed 0, where the pusher shall be, pixels."""


@pytest.mark.parametrize("checkpoint", FIRST_ACTIONS)
def test_the_shipped_policy_acts_as_it_did_when_it_was_measured(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # from where it names its text encoder
    policy, task = load_subject(Path(checkpoint), ENV, "cpu")
    observation = next(task.observations(policy, 100_000))
    postprocessor = load_processors(Path(checkpoint), policy.act.policy)[1]

    def first_actions() -> np.ndarray:
        torch.manual_seed(0)
        return postprocessor(policy(observation)[0]).numpy()

    np.testing.assert_allclose(first_actions(), FIRST_ACTIONS[checkpoint], atol=0.01)
    bacinfer.apply(policy, bacinfer.SamplingPlan())
    assert bacinfer.summary(policy).engine == "fused"
    np.testing.assert_allclose(first_actions(), FIRST_ACTIONS[checkpoint], atol=0.01)


def test_the_environments_state_becomes_a_part_of_the_state() -> None:
    step = AppendEnvironmentState()
    robot, block, words = torch.rand(3, 2), torch.rand(3, 16), ["push"] * 3
    seen = step.observation({OBS_STATE: robot, OBS_ENV_STATE: block, "words": words})
    assert seen.keys() == {OBS_STATE, "words"}
    assert torch.equal(seen[OBS_STATE], torch.cat([robot, block], dim=1))
    features = {
        PipelineFeatureType.OBSERVATION: {
            OBS_STATE: PolicyFeature(FeatureType.STATE, (2,)),
            OBS_ENV_STATE: PolicyFeature(FeatureType.ENV, (16,)),
        },
        PipelineFeatureType.ACTION: {ACTION: PolicyFeature(FeatureType.ACTION, (2,))},
    }
    found = step.transform_features(features)
    assert found[PipelineFeatureType.OBSERVATION] == {OBS_STATE: PolicyFeature(FeatureType.STATE, (18,))}
    assert found[PipelineFeatureType.ACTION] == features[PipelineFeatureType.ACTION]
    assert OBS_ENV_STATE in features[PipelineFeatureType.OBSERVATION]
    with pytest.raises(ValueError, match=r"but observation\.environment_state was not observed: LeRobot's Push-T"):
        step.observation({OBS_STATE: robot})


def test_training_shows_what_the_environment_shows() -> None:
    specification = importlib.util.spec_from_file_location("train_lerobot_pusht", SCRIPT)
    script = importlib.util.module_from_spec(specification)  # type: ignore[arg-type]
    specification.loader.exec_module(script)  # type: ignore[union-attr]
    env = PushTEnv(obs_type="environment_state_agent_pos")
    env.reset(seed=0)
    for pose in ([200.0, 300.0, 0.5], [310.0, 120.0, 4.0]):
        env.block.angle = pose[2]  # first: it turns the block about its centre of gravity
        env.block.position = pose[:2]
        np.testing.assert_allclose(script.corners(np.array([pose]))[0], env.get_obs()["environment_state"], atol=1e-3)


@pytest.mark.parametrize("objective", ["diffusion", "flow_matching"])
def test_training_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str) -> None:
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    np.savez(
        tmp_path / "demos.npz",
        state=random.uniform(100, 400, (60, 5)),
        action=random.uniform(0, 512, (60, 2)),
        episode_ends=np.array([30, 60]),
    )

    def train(steps: int) -> str:
        flags = ["--data=demos.npz", "--out=policy", f"--steps={steps}", f"--objective={objective}"]
        command = [sys.executable, str(SCRIPT), *flags]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stderr

    def weights() -> torch.Tensor:
        return load_policy(Path("policy")).noise_predictor.output_proj.weight

    train(2)
    before = weights()
    assert "2/3" in train(3)
    assert not torch.equal(weights(), before)
    assert load_policy(Path("policy")).config.objective == objective
