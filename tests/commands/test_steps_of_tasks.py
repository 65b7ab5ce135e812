"""The loop over tasks: checkpoints found by listing, failures that do not stop the others."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bacinfer import assets
from bacinfer.commands.steps_of_tasks import find_policy, main


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def trained(task: str, name: str) -> Path:
    path = Path("checkpoint") / task / "diffusion_policy_transformer" / "train_0" / "checkpoints" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def test_the_best_checkpoint_comes_before_the_latest_and_the_shipped_one(tmp_path: Path) -> None:
    assert find_policy("pusht") is None
    shipped = Path("assets") / "pusht" / "policy.ckpt"
    shipped.parent.mkdir(parents=True)
    for path in (
        shipped,
        trained("pusht", "latest.ckpt"),
        trained("pusht", "epoch=0001-test_mean_score=0.500.ckpt"),
        trained("pusht", "epoch=0000-test_mean_score=0.750.ckpt"),
    ):
        path.touch()
        assert find_policy("pusht") == path


def test_tasks_are_analysed_and_failures_do_not_stop_the_others(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained("lift_ph", "latest.ckpt").write_text("damaged")
    shutil.copy(checkpoint, trained("pusht", "latest.ckpt"))
    assert main(["--task", "lift_ph,pusht,can_ph", "--num_caches", "3", "--metrics", "l1"]) == 1
    captured = capsys.readouterr()
    outcomes = dict(line.split(maxsplit=1) for line in captured.out.splitlines()[-3:])
    assert outcomes == {"lift_ph": "failed", "pusht": "done", "can_ph": "no checkpoint"}
    assert "lift_ph" in captured.err
    assert "error: " in captured.err
    run = assets.RunAssets(Path("assets/pusht/original"))
    assert assets.available_schedules(run.steps_dir("l1")) == [("l1", 3)]


def test_results_are_used_again_if_asked_to(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(checkpoint, trained("pusht", "latest.ckpt"))
    command = ["--task", "pusht", "--num_caches", "3", "--metrics", "l1"]
    assert main(command) == 0
    assert main(command) == 0
    assert "using" not in capsys.readouterr().err
    assert main([*command, "--no_force"]) == 0
    assert "using" in capsys.readouterr().err


def test_tasks_without_a_checkpoint_are_no_failure_unless_asked_for(checkpoint: Path) -> None:
    shutil.copy(checkpoint, trained("pusht", "latest.ckpt"))
    assert main(["--ph_only", "--num_caches", "3", "--metrics", "l1"]) == 0
    assert main(["--task", "lift_ph", "--num_caches", "3", "--metrics", "l1"]) == 1


def test_groups_are_those_of_the_task_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--lowdim_only"]) == 1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["block_pushing", "kitchen"]


def test_unknown_tasks_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--task", "pusht,juggling"]) == 2
    assert "juggling" in capsys.readouterr().err
