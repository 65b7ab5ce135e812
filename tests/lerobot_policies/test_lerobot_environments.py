"""LeRobot's checkpoints in LeRobot's environments: episodes by its own rollout, results as of any other policy."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("lerobot") is None:
    pytest.skip("needs lerobot, in an environment of its own", allow_module_level=True)

from lerobot.envs.factory import make_env, make_env_config, make_env_pre_post_processors
from lerobot.policies.factory import make_pre_post_processors
from lerobot.scripts import lerobot_eval

import bacinfer.lerobot
import tiny_lerobot as tiny
from bacinfer import Sampler, SamplingPlan
from bacinfer.commands.cli import main
from bacinfer.experiments.store import ResultsStore
from bacinfer.lerobot.environment import load_subject
from bacinfer.tasks.video import read_video

STEPS = 8
SETTINGS = {"episode_length": STEPS, "observation_height": 96, "observation_width": 96}
ENV = ",".join(["pusht", *(f"{name}={value}" for name, value in SETTINGS.items())])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_pusht_checkpoint(tmp_path_factory.mktemp("lerobot"))


def by_hand(checkpoint: Path, policy: Any, seed: int) -> float:
    """The highest reward of an episode, from LeRobot's functions alone."""
    config = make_env_config("pusht", **SETTINGS)
    environments = make_env(config, n_envs=1)["pusht"][0]
    processors = make_pre_post_processors(policy.config, pretrained_path=str(checkpoint))
    torch.manual_seed(seed)
    found = lerobot_eval.rollout(
        environments, policy, *make_env_pre_post_processors(config, policy.config), *processors, seeds=[seed]
    )
    return float(found["reward"].max())


def test_episodes_are_lerobots(checkpoint: Path, tmp_path: Path) -> None:
    policy, task = load_subject(checkpoint, ENV, "cpu")
    found = task.rollout(policy, [3, 100_000], n_envs=1, video_dir=tmp_path, video_seeds=[3])
    assert found.scores == {seed: by_hand(checkpoint, policy.act.policy, seed) for seed in (3, 100_000)}  # type: ignore[union-attr]
    assert found.num_steps == {3: STEPS, 100_000: STEPS}
    assert len(found.policy_seconds) == 2 * STEPS
    assert found.mean_score == found.scores[100_000]
    assert len(list(read_video(found.videos[3]))) == STEPS + 1

    together = task.rollout(policy, [3, 100_000], n_envs=2)
    assert together.scores.keys() == found.scores.keys()
    other_noise = task.rollout(policy, [3, 100_000], n_envs=1, noise_seed=1)
    assert other_noise.scores != found.scores


def test_a_plan_is_run(checkpoint: Path) -> None:
    policy, task = load_subject(checkpoint, ENV, "cpu")
    plain = task.rollout(policy, [100_000]).scores
    bacinfer.apply(policy, SamplingPlan(sampler=Sampler("own", 2)))
    assert task.rollout(policy, [100_000]).scores != plain
    bacinfer.remove(policy)
    assert task.rollout(policy, [100_000]).scores == plain


def test_observations_are_those_of_calls(checkpoint: Path) -> None:
    policy, task = load_subject(checkpoint, ENV, "cpu")
    first, second = task.observations(policy, 5, count=2)
    assert first["observation.state"].shape == (1, 2)
    assert not torch.equal(first[tiny.PUSHT_IMAGE], second[tiny.PUSHT_IMAGE])
    assert policy(first).shape[0] == 1
    assert torch.equal(next(task.observations(policy, 5))["observation.state"], first["observation.state"])


def test_a_comparison(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", f"--lerobot={checkpoint}", f"--env={ENV}", f"--output_dir={tmp_path}", "--n_test=2"]
    command += ["--n_envs=2", "--latency_calls=1", "--methods=own:5,own:5+lossless,bac:4:1"]
    assert main(command) == 0
    rows = {row.method: row for row in ResultsStore(tmp_path).rows()}
    assert {method: row.num_inference_steps for method, row in rows.items()} == {
        "plain": 10,
        "own:5": 5,
        "own:5+lossless": 5,
        "bac:4:1": 10,
    }
    # lossless is a program, whose actions are equal up to rounding
    assert rows["own:5+lossless"].score == pytest.approx(rows["own:5"].score, abs=1e-3)
    assert rows["own:5+lossless"].action_error == pytest.approx(rows["own:5"].action_error, rel=1e-4)
    assert rows["own:5"].action_error > 0
    assert rows["plain"].flops / 2 < rows["own:5"].flops < rows["plain"].flops  # the encoders' are the same
    assert rows["bac:4:1"].mean_updates < 10
    assert rows["bac:4:1"].task == ENV
    configuration = json.loads((tmp_path / rows["own:5"].directory / "configuration.json").read_text())
    assert configuration["env"] == ENV
    capsys.readouterr()
    assert main(command) == 0
    assert "evaluated" not in capsys.readouterr().err


def test_an_evaluation_with_a_film(checkpoint: Path, tmp_path: Path) -> None:
    command = ["eval", f"--lerobot={checkpoint}", f"--env={ENV}", f"--output_dir={tmp_path}", "--n_test=1"]
    assert main([*command, "--latency_calls=1", "--cache_mode=threshold", "--cache_threshold=3"]) == 0
    assert json.loads((tmp_path / "eval_results.json").read_text())["cache_mode"] == "threshold"
    assert (tmp_path / "media" / "side_by_side.mp4").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--lerobot {checkpoint}", "--lerobot and --env go together"),
        ("-c {checkpoint} --env pusht", "--lerobot and --env go together"),
        ("--lerobot {checkpoint} --env ppusht", "Environment type 'ppusht' is not registered"),
        ("--lerobot {checkpoint} --env pusht,length=3", "--env pusht,length=3: "),
        ("--lerobot {checkpoint} --env {env} --disturb", "cannot be disturbed"),
        ("--lerobot {checkpoint} --env {env} --methods own:101", "trained with 100 timesteps, which own:101 exceeds"),
        ("--lerobot {checkpoint} --env {env} --methods warm:40:3", "a warm start replaces the denoising loop"),
        ("--lerobot {nothing} --env pusht", "no checkpoint at"),
    ],
)
def test_mistakes(
    arguments: str, message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"checkpoint": checkpoint, "env": ENV, "nothing": tmp_path / "nothing"}
    command = [part.format(**values) for part in arguments.split()]
    assert main(["compare", *command, f"--output_dir={tmp_path / 'out'}", "--n_test=1", "--latency_calls=1"]) != 0
    assert message in capsys.readouterr().err
