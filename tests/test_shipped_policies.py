"""The policies in assets/: each loads, belongs to its task, acts, and has schedules that fit it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from bacinfer import FastDiffusionPolicy
from bacinfer.assets import available_schedules
from bacinfer.policies import Checkpoint, build_policy, read_checkpoint
from bacinfer.tasks import TASKS, make_task
from bacinfer.tasks.checkpoints import shipped_checkpoint

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(path.parent.name for path in (ROOT / "assets").glob("*/*.ckpt"))
"""Beside them lies one of LeRobot's: tests/lerobot_policies/test_lerobot_pusht.py."""
MAX_MB = 54  # 22 of them are the one policy that sees: a ResNet-18 has five times its transformer's weights


@pytest.fixture(params=SHIPPED)
def task_name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(ROOT)
    return request.param


def load(task_name: str) -> tuple[Any, Any]:
    checkpoint = shipped(task_name)
    if task_name == "block_pushing":
        pytest.importorskip("diffusion_policy.env_runner.blockpush_lowdim_runner", reason="needs diffusion_policy")
    return build_policy(checkpoint, "cpu"), make_task(checkpoint.cfg)


def shipped(task_name: str) -> Checkpoint:
    path = shipped_checkpoint(task_name)
    assert path is not None
    return read_checkpoint(path)


def test_all_of_them_are_there() -> None:
    assert SHIPPED == ["assembly", "block_pushing", "drawer_open", "pick_place", "pusht", "pusht_image"]
    assert set(SHIPPED) <= TASKS.keys()
    size = sum(path.stat().st_size for path in (ROOT / "assets").rglob("*") if path.is_file())
    assert size < MAX_MB * 1e6


def test_it_acts_on_its_task(task_name: str) -> None:
    policy, task = load(task_name)
    assert task.name == task_name
    (observation,) = task.observations(policy, 11)
    normalised = policy.normalizer["action"].normalize(policy.predict_action(observation)["action"])
    assert normalised.shape[:2] == (1, policy.n_action_steps)
    assert normalised.abs().max() <= 1.001  # the sampler clips to the range of the demonstrations


def test_block_pushing_needs_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(sys.modules, "diffusion_policy.env_runner.blockpush_lowdim_runner", None)
    with pytest.raises(RuntimeError, match=r"task block_pushing needs diffusion_policy\.\S+, which cannot be imported"):
        make_task(shipped("block_pushing").cfg)


def test_the_page_of_policies_has_its_row(task_name: str) -> None:
    policy = build_policy(shipped(task_name), "cpu")
    page = (ROOT / "docs" / "reference" / "shipped-policies.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith(f"| `{task_name}`"))
    millions = sum(parameter.numel() for parameter in policy.model.parameters()) / 1e6
    assert re.search(r"\| ([\d.]+) M ", row)[1] == f"{millions:.1f}"  # type: ignore[index]


def test_its_schedules_fit(task_name: str) -> None:
    policy = build_policy(shipped(task_name), "cpu")
    for metric in ("cosine", "l1", "mse"):
        steps_dir = ROOT / "assets" / task_name / "original" / "optimal_steps" / metric
        assert {num_caches for _, num_caches in available_schedules(steps_dir)} == {5, 8, 10, 20}
        FastDiffusionPolicy.apply_cache(
            policy, optimal_steps_dir=steps_dir, num_caches=10, metric=metric, num_bu_blocks=5
        )
        updates = FastDiffusionPolicy.summary(policy).mean_updates
        assert 10 <= updates < 30


def test_its_training_log_is_kept(task_name: str) -> None:
    directory = ROOT / "assets" / task_name / "training"
    entries = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    losses = [entry["train_loss"] for entry in entries if "train_loss" in entry]
    assert losses[-1] < losses[0]
    assert (directory / "loss.png").stat().st_size > 0
    checkpoint = read_checkpoint(ROOT / "assets" / task_name / f"{task_name}_transformer.ckpt")
    assert entries[-1]["global_step"] <= checkpoint.progress("global_step")


@pytest.mark.parametrize("name", ["drawer_open", "pick_place"])
def test_the_cached_arm_solves_its_task(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    policy, task = load(name)
    FastDiffusionPolicy.apply_cache(
        policy,
        optimal_steps_dir=ROOT / "assets" / name / "original" / "optimal_steps" / "cosine",
        num_caches=20,
        num_bu_blocks=5,
    )
    assert task.rollout(policy, range(100_000, 100_003)).mean_score > 0.5
