"""From a checkpoint of LeRobot's and a data set to a checkpoint that LeRobot's own commands run by a plan."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("lerobot") is None:
    pytest.skip("needs lerobot, in an environment of its own", allow_module_level=True)

from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.utils.import_utils import register_third_party_plugins

import bacinfer.lerobot
import tiny_lerobot as tiny
from bacinfer import CacheSchedule, SamplingPlan
from bacinfer.commands.cli import main

K = 10


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_pusht_checkpoint(tmp_path_factory.mktemp("lerobot"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_pusht_dataset(tmp_path_factory.mktemp("data") / "pusht")


@pytest.fixture
def plan(checkpoint: Path, tmp_path: Path) -> Path:
    keys = [f"transformer_blocks.{i}_{kind}" for i in range(2) for kind in ("sa_block", "ff_block")]
    SamplingPlan(CacheSchedule.periodic(keys, K, 3)).save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def load(checkpoint: Path) -> Any:
    """The policy as LeRobot's commands load it."""
    register_third_party_plugins()
    config = PreTrainedConfig.from_pretrained(checkpoint)
    return get_policy_class(config.type).from_pretrained(checkpoint)


def observation() -> dict[str, Any]:
    return {
        "observation.state": torch.tensor([[0.1, -0.3]]),
        tiny.PUSHT_IMAGE: torch.linspace(0, 1, 3 * 96 * 96).view(1, 3, 96, 96),
        "observation.language.tokens": torch.tensor([[3, 4, 5]]),
        "observation.language.attention_mask": torch.ones(1, 3, dtype=torch.bool),
    }


def act(policy: Any) -> torch.Tensor:
    torch.manual_seed(5)
    return bacinfer.lerobot.handle(policy)(observation())


def test_from_a_data_set_to_a_policy_that_lerobot_loads(
    checkpoint: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ["steps", f"--lerobot={checkpoint}", f"--dataset={dataset}", f"--output_dir={tmp_path}"]
    assert main([*steps, "--num_demos=2", "--observations_per_demo=2", "--num_caches=3", "--metrics=cosine"]) == 0
    found = tmp_path / "original" / "optimal_steps" / "cosine"
    assert f"bacinfer lerobot export {checkpoint} {found} OUT --num_caches 3" in capsys.readouterr().out
    recorded = json.loads((tmp_path / "original" / "block_errors.json").read_text())
    assert recorded  # of four observations

    out = tmp_path / "out"
    assert main(["lerobot", "export", *map(str, (checkpoint, found, out)), "--num_caches=3", "--num_bu_blocks=1"]) == 0
    policy = load(out)
    assert policy.config.type == "multi_task_dit_bac"
    schedule = bacinfer.lerobot.summary(policy).schedule
    assert schedule is not None
    assert all(3 <= len(steps) < K for steps in schedule.update_steps.values())
    other = bacinfer.lerobot.apply(load(checkpoint), schedule)
    assert torch.equal(act(policy), act(other))
    assert not torch.equal(act(policy), act(bacinfer.lerobot.remove(other)))

    policy.save_pretrained(tmp_path / "saved")
    assert torch.equal(act(load(tmp_path / "saved")), act(policy))


def test_other_weights_than_the_plan_was_exported_for_are_refused(checkpoint: Path, plan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["lerobot", "export", str(checkpoint), str(plan), str(out)]) == 0
    policy = load(out)
    policy.noise_predictor.output_proj.bias.data += 1
    policy.save_pretrained(out)
    with pytest.raises(ValueError, match="the plan was made for another policy"):
        load(out)


def test_a_configuration_without_a_plan_is_refused(checkpoint: Path, plan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["lerobot", "export", str(checkpoint), str(plan), str(out)]) == 0
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "bac_plan": ""}))
    with pytest.raises(ValueError, match="of type multi_task_dit_bac has no plan"):
        load(out)


def test_new_policies_have_their_processors_from_lerobot(checkpoint: Path, plan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["lerobot", "export", str(checkpoint), str(plan), str(out)]) == 0
    preprocessor, _ = make_pre_post_processors(load(out).config)
    assert preprocessor({"observation.state": torch.zeros(2), "task": "push"})["observation.state"].shape == (1, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("lerobot export {nothing} {plan} {out}", "is no checkpoint of LeRobot's, it has no config.json"),
        ("lerobot export {checkpoint} {plan} {checkpoint}", "is there already; name a new directory"),
        ("lerobot export {checkpoint} {nothing} {out}", "No such file"),
        ("lerobot export {checkpoint} {plan} {out} --num_caches 3", "are for a directory of update steps"),
        ("steps --lerobot {checkpoint} -o {out}", "--lerobot needs --dataset"),
        ("steps -c {checkpoint} --dataset {dataset} -o {out}", "--dataset is for --lerobot"),
        (
            "steps --lerobot {checkpoint} --dataset {checkpoint} -o {out}",
            "no data set of LeRobot's, it has no meta/info",
        ),
        ("steps --lerobot {checkpoint} --dataset {nothing} -o {out}", "and no such data set on the Hub"),
        (
            "steps --lerobot {checkpoint} --dataset {dataset} -o {out} --demo_idx 2 --num_caches 3",
            "there is no episode 2: the data set has 2",
        ),
    ],
)
def test_mistakes(
    arguments: str,
    message: str,
    checkpoint: Path,
    dataset: Path,
    plan: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = {"checkpoint": checkpoint, "dataset": dataset, "plan": plan, "out": tmp_path / "out"}
    assert main([part.format(nothing=tmp_path / "nothing", **paths) for part in arguments.split()]) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.json"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", "config.json, line 1: this is no JSON"),
        ("config.json", '{"type": "nothing"}', "Policy type 'nothing'"),
        ("config.json", '{"type": "multi_task_dit", "new": 1}', "config.json: The fields `new` are not valid"),
        ("config.json", '{"type": "multi_task_dit_bac"}', "holds a plan already; name the checkpoint that it was"),
        ("config.json", '{"type": "act"}', "ACTPolicy is no LeRobot policy that can be cached"),
        (
            "config.json",
            '{"type": "multi_task_dit", "text_encoder_name": "no/such/clip"}',
            "encoders that its config.json",
        ),
        ("model.safetensors", "no weights", "cannot be run: Error while deserializing"),
    ],
)
def test_checkpoints_that_cannot_be_run(
    name: str, content: str, message: str, checkpoint: Path, plan: Path, tmp_path: Path, capsys: Any
) -> None:
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    (damaged / name).write_text(content)
    assert main(["lerobot", "export", str(damaged), str(plan), str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_lerobot_eval_runs_it(checkpoint: Path, plan: Path, tmp_path: Path) -> None:
    """Its own command, in a process of its own, with no line of code."""
    out = tmp_path / "out"
    assert main(["lerobot", "export", str(checkpoint), str(plan), str(out)]) == 0
    flags = {
        "policy.path": out,
        "policy.device": "cpu",
        "env.type": "pusht",
        "env.observation_height": 96,
        "env.observation_width": 96,
        "env.episode_length": 7,
        "eval.n_episodes": 1,
        "eval.batch_size": 1,
        "eval.use_async_envs": "false",
        "output_dir": tmp_path / "eval",
    }
    command = [sys.executable, "-m", "lerobot.scripts.lerobot_eval", *(f"--{k}={v}" for k, v in flags.items())]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "MultiTaskDiTBac" in done.stdout + done.stderr or "multi_task_dit_bac" in done.stdout + done.stderr
    assert json.loads((tmp_path / "eval" / "eval_info.json").read_text())["overall"]["n_episodes"] == 1
