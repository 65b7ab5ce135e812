"""Many evaluations: which checkpoints, what is kept, what a failure does, and the CSV file."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bacinfer.commands import batch
from bacinfer.experiments import experiment
from bacinfer.experiments.experiment import Experiment
from bacinfer.experiments.method import PLAIN
from bacinfer.experiments.store import ResultsStore, Row, run_directory
from bacinfer.tasks.checkpoints import find_checkpoint, shipped_checkpoint
from small_experiments import make_row, write_tiny_steps

REPOSITORY = Path(__file__).parents[2]
HEADER = ["Method", "Steps", "Task", "Seed", "CheckpointType", "SuccessRate", "FLOPs", "Speedup"]


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands look for checkpoint/ and assets/ in the current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def add_checkpoint(task: str, seed: int, name: str, root: str = "checkpoint", source: Path | None = None) -> Path:
    path = Path(root) / task / "diffusion_policy_transformer" / f"train_{seed}" / "checkpoints" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if source is None:
        path.write_text(f"not a checkpoint: {path}")
    else:
        shutil.copy(source, path)
    return path


class FakeEvaluation:
    """Stands in for the measuring: leaves results as it does, or fails where the checkpoint says so."""

    def __init__(self) -> None:
        self.runs: list[Experiment] = []
        self.plain_runs: list[Experiment] = []

    def __call__(self, asked: Experiment, plain: Any, results_dir: Path, film: bool) -> Row:
        (self.plain_runs if asked.method == PLAIN else self.runs).append(asked)
        if "train_2" in asked.checkpoint:
            raise ValueError("bad magic number")
        log = {"test/mean_score": 0.875, "test/p1": 0.5, "test/p2": 0.25} | {
            f"test/p_{i}": 0.1 * i for i in range(1, 8)
        }
        row = make_row(
            asked.key, method=asked.method.spec, flops=1_234_567_890, speedup=3.21987, num_inference_steps=100
        )
        directory = results_dir / row.directory
        directory.mkdir(parents=True, exist_ok=True)
        for name in ("benchmark_results", "eval_results", "fast_eval_log"):
            (directory / f"{name}.json").write_text(json.dumps(log))
        return row


@pytest.fixture
def evaluation(monkeypatch: pytest.MonkeyPatch) -> FakeEvaluation:
    fake = FakeEvaluation()
    monkeypatch.setattr(experiment, "_evaluate", fake)
    monkeypatch.setattr(experiment, "check", lambda experiments, results_dir: None)
    monkeypatch.setattr(experiment, "read_plain_result", lambda *_: None)
    return fake


def rows(output_dir: str = "out") -> list[list[str]]:
    with (Path(output_dir) / "results.csv").open(newline="") as file:
        return list(csv.reader(file))


def run_of(asked: Experiment, output_dir: str = "out") -> Path:
    return Path(output_dir) / run_directory(asked.method.spec, asked.key)


def run(*argv: str) -> int:
    return batch.main(["--steps=10", "--output_dir=out", *argv])


# -- checkpoints -------------------------------------------------------------------------------------------------


def test_checkpoints_are_found_by_listing() -> None:
    add_checkpoint("can_ph", 0, "epoch=0650-test_mean_score=0.900.ckpt")
    best = add_checkpoint("can_ph", 0, "epoch=1000-test_mean_score=1.000.ckpt")
    add_checkpoint("can_ph", 0, "epoch=0050-test_mean_score=1.000.ckpt")
    add_checkpoint("can_ph", 0, "epoch=0100.ckpt")
    latest = add_checkpoint("can_ph", 0, "latest.ckpt")
    kitchen = add_checkpoint("kitchen", 1, "latest.ckpt", root="checkpoint/low_dim")
    assert find_checkpoint("can_ph", 0, "max") == best
    assert find_checkpoint("can_ph", 0, "avg") == latest
    assert find_checkpoint("can_ph", 1, "max") is None
    assert find_checkpoint("kitchen", 1, "avg") == kitchen
    assert find_checkpoint("kitchen", 1, "max") is None


# -- batches -----------------------------------------------------------------------------------------------------


def test_tasks_seeds_and_types(evaluation: FakeEvaluation) -> None:
    for seed in (0, 1):
        add_checkpoint("can_ph", seed, "latest.ckpt")
        add_checkpoint("can_ph", seed, "epoch=0650-test_mean_score=0.900.ckpt")
    assert run("--seeds=0,1", "--num_bu_blocks=3", "--n_test=7", "--device=cpu") == 0
    assert [(a.training_seed, a.checkpoint_type, Path(a.checkpoint).name) for a in evaluation.runs] == [
        (seed, kind, name)
        for seed in (0, 1)
        for kind, name in (("max", "epoch=0650-test_mean_score=0.900.ckpt"), ("avg", "latest.ckpt"))
    ]
    for asked in evaluation.runs:
        assert asked.assets_dir == "assets/can_ph/original"
        assert (asked.method.spec, asked.n_test, asked.device) == ("bac:10:3", 7, "cpu")
    for seed, kind in itertools.product((0, 1), ("max", "avg")):
        directory = Path("out/can_ph") / f"seed{seed}_{kind}"
        assert {path.name for path in directory.iterdir()} == {
            "benchmark_results.json",
            "eval_results.json",
            "fast_eval_log.json",
        }
    assert rows() == [
        HEADER,
        *(
            ["BAC", "10", "can_ph", seed, kind, "0.8750", "1234567890", "3.220"]
            for seed in ("0", "1")
            for kind in ("max", "avg")
        ),
    ]


def test_tasks_with_several_metrics(evaluation: FakeEvaluation, capsys: pytest.CaptureFixture[str]) -> None:
    for task in ("block_pushing", "kitchen", "can_ph"):
        add_checkpoint(task, 0, "latest.ckpt")
    assert run("--seeds=0", "--lowdim_only", "--checkpoint_type=avg") == 0
    assert [(row[2], row[5]) for row in rows()[1:]] == [
        ("block_pushing_p1", "0.5000"),
        ("block_pushing_p2", "0.2500"),
        ("kitchen_p_1", "0.1000"),
        ("kitchen_p_2", "0.2000"),
        ("kitchen_p_3", "0.3000"),
        ("kitchen_p_4", "0.4000"),
    ]
    table = capsys.readouterr().out
    assert "block_pushing_p2" in table
    assert "evaluated" in table


def test_threshold_mode(evaluation: FakeEvaluation) -> None:
    add_checkpoint("can_mh", 0, "latest.ckpt")
    assert run("--seeds=0", "--cache_mode=threshold", "--checkpoint_type=avg", "--mh_only") == 0
    assert [asked.method.spec for asked in evaluation.runs] == ["uniform:10"]
    assert rows()[1][0] == "Uniform"


@pytest.mark.parametrize(
    ("flag", "tasks"),
    [
        ("--ph_only", ["can_ph"]),
        ("--mh_only", ["lift_mh"]),
        ("--lowdim_only", ["block_pushing", "kitchen"]),
        ("--arm_only", ["pick_place"]),
        ("--bp_only", ["block_pushing"]),
        ("--kitchen_only", ["kitchen"]),
        ("--task=kitchen,can_ph", ["kitchen", "can_ph"]),
    ],
)
def test_choosing_tasks(evaluation: FakeEvaluation, flag: str, tasks: list[str]) -> None:
    for task in ("can_ph", "lift_mh", "block_pushing", "kitchen", "pick_place"):
        add_checkpoint(task, 0, "latest.ckpt")
    assert run(flag, "--seeds=0", "--checkpoint_type=avg") == 0
    assert list(dict.fromkeys(Path(asked.checkpoint).parts[1] for asked in evaluation.runs)) == tasks


def test_the_help_says_which_tasks_are_smoke_tests() -> None:
    listed = " ".join(batch.build_parser("bac").format_help().split())
    assert "drawer_open (a smoke test), pick_place (a smoke test)" in listed
    assert "pusht," in listed


def test_disturbed_episodes(evaluation: FakeEvaluation) -> None:
    add_checkpoint("can_ph", 0, "latest.ckpt")
    argv = ("--seeds=0", "--checkpoint_type=avg")
    assert run(*argv) == 0
    assert run(*argv, "--disturb") == 0
    assert [asked.disturb for asked in evaluation.runs] == [False, True]


def test_half_precision(evaluation: FakeEvaluation) -> None:
    add_checkpoint("can_ph", 0, "latest.ckpt")
    argv = ("--seeds=0", "--checkpoint_type=avg")
    assert run(*argv) == 0
    assert run(*argv, "--precision=bf16") == 0
    assert [asked.precision for asked in evaluation.runs] == [None, "bf16"]


def test_what_is_there_is_kept(evaluation: FakeEvaluation, capsys: pytest.CaptureFixture[str]) -> None:
    add_checkpoint("can_ph", 0, "latest.ckpt")
    argv = ("--seeds=0", "--checkpoint_type=avg")
    assert run(*argv) == 0
    first = rows()
    assert run(*argv) == 0
    assert len(evaluation.runs) == 1
    assert "kept" in capsys.readouterr().out
    assert rows() == first
    assert run(*argv, "--force") == 0
    assert len(evaluation.runs) == 2


def test_an_interrupted_evaluation_is_not_kept(evaluation: FakeEvaluation) -> None:
    add_checkpoint("can_ph", 0, "latest.ckpt")
    argv = ("--seeds=0", "--checkpoint_type=avg")
    run(*argv)
    (run_of(evaluation.runs[0]) / "row.json").unlink()  # it is written last
    assert run(*argv) == 0
    assert len(evaluation.runs) == 2


def test_a_result_of_other_settings_is_not_passed_off(evaluation: FakeEvaluation) -> None:
    add_checkpoint("can_ph", 0, "latest.ckpt")
    argv = ("--seeds=0", "--checkpoint_type=avg")
    run(*argv)
    assert run(*argv, "--n_test=3") == 0
    assert [asked.n_test for asked in evaluation.runs] == [50, 3]
    add_checkpoint("can_ph", 0, "latest.ckpt").write_bytes(b"trained further")
    assert run(*argv) == 0
    assert len(evaluation.runs) == 3


def test_batches_share_the_plain_policy(evaluation: FakeEvaluation) -> None:
    add_checkpoint("can_ph", 0, "latest.ckpt")
    for M in (5, 10):
        assert batch.main([f"--steps={M}", "--seeds=0", "--checkpoint_type=avg"]) == 0
    assert len(ResultsStore("results").rows()) == 3
    assert len(rows("results/bac_cosine_5_bu5")) == len(rows("results/bac_cosine_10_bu5")) == 2


def test_results_of_an_earlier_version(evaluation: FakeEvaluation, capsys: pytest.CaptureFixture[str]) -> None:
    add_checkpoint("can_ph", 0, "latest.ckpt")
    Path("out").mkdir()
    Path("out/results_table.csv").write_text("key,task\n")
    assert run("--seeds=0") == 2
    assert "out/results_table.csv is of an earlier version" in capsys.readouterr().err
    assert not evaluation.plain_runs


def test_failures_do_not_stop_the_others(evaluation: FakeEvaluation, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 2, 3):
        add_checkpoint("can_ph", seed, "latest.ckpt")
    assert run("--seeds=0,1,2,3", "--checkpoint_type=avg") == 1
    assert [row[3] for row in rows()[1:]] == ["0", "3"]
    output = capsys.readouterr()
    assert "can_ph seed 1 avg missing" in output.err
    assert "train_1" in output.err
    assert re.search("can_ph seed 2 avg failed: .*bad magic number", output.err)
    assert "| can_ph |    2 |        avg |    failed |" in Path("out/results.md").read_text()
    assert [line.split()[3] for line in output.out.splitlines() if line.startswith("can_ph  ")] == [
        "evaluated",
        "missing",
        "failed",
        "evaluated",
    ]


@pytest.mark.parametrize("content", ["{", "{}", '{"test/mean_score": null}', None])
def test_damaged_results_do_not_stop_the_others(
    evaluation: FakeEvaluation, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    for seed in (0, 1):
        add_checkpoint("can_ph", seed, "latest.ckpt")
    argv = ("--seeds=0,1", "--checkpoint_type=avg")
    assert run(*argv) == 0
    path = run_of(evaluation.runs[0]) / "fast_eval_log.json"
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    assert run(*argv) == 1
    assert f"seed 0 avg failed: the results in {path.parent} are not whole" in capsys.readouterr().err
    assert [row[3] for row in rows()[1:]] == ["1"]


def test_tasks_without_a_checkpoint(evaluation: FakeEvaluation, capsys: pytest.CaptureFixture[str]) -> None:
    add_checkpoint("can_ph", 0, "latest.ckpt")
    argv = ("--seeds=0", "--checkpoint_type=avg")
    assert run(*argv) == 0
    assert "left out, as there is no checkpoint: lift_ph, square_ph, pusht" in capsys.readouterr().out
    assert run(*argv, "--task=can_ph,lift_ph") == 1
    assert "lift_ph seed 0 avg missing" in capsys.readouterr().err
    assert run(*argv, "--mh_only") == 2
    assert "no checkpoint of any of these tasks" in capsys.readouterr().err


def test_shipped_checkpoint_stands_in(
    evaluation: FakeEvaluation, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = workspace / "assets" / "pusht" / "pusht.ckpt"
    path.parent.mkdir(parents=True)
    path.touch()
    assert shipped_checkpoint("pusht") == Path("assets/pusht/pusht.ckpt")
    assert run("--seeds=0,1") == 0
    (asked,) = evaluation.runs
    assert (asked.checkpoint, asked.training_seed) == ("assets/pusht/pusht.ckpt", None)
    assert Path("out/pusht/seed0_max/eval_results.json").is_file()
    assert "shipped assets/pusht/pusht.ckpt" in capsys.readouterr().out
    assert rows()[1][2:5] == ["pusht", "", "shipped"]

    add_checkpoint("pusht", 1, "latest.ckpt")
    assert run("--seeds=1", "--task=pusht", "--checkpoint_type=avg") == 0
    assert evaluation.runs[-1].checkpoint.startswith("checkpoint/")


def test_default_output_directory_names_the_cache(evaluation: FakeEvaluation) -> None:
    add_checkpoint("can_ph", 0, "latest.ckpt")
    assert batch.main(["--steps=8", "--metric=l1", "--num_bu_blocks=2", "--seeds=0", "--checkpoint_type=avg"]) == 0
    assert len(rows("results/bac_l1_8_bu2")) == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--task=lift"], "unknown task lift"),
        (["--device=warp:9"], "warp:9"),
        (["--n_test=0"], "--n_test 0"),
        (["--latency_calls=0"], "--latency_calls 0"),
        (["--steps=0"], "num_caches must be at least 1, got 0"),
        (["--cache_mode=threshold", "--num_bu_blocks=5"], "num_bu_blocks=5 has no effect with cache_mode='threshold'"),
        (["--cache_mode=threshold", "--metric=l1"], "metric=l1 has no effect with cache_mode='threshold'"),
    ],
)
def test_mistakes(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    add_checkpoint("can_ph", 0, "latest.ckpt")
    assert run(*argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--seeds=a"], ["--ph_only", "--task=pusht"], ["--cache_mode=edit"]])
def test_mistakes_that_argparse_finds(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        run(*argv)
    assert error.value.code == 2


@pytest.mark.parametrize(
    ("flags", "tasks"),
    [
        ([], ["can_ph", "lift_mh", "kitchen"]),
        (["--task_type=both"], ["can_ph", "lift_mh"]),
        (["--task_type=lowdim"], ["kitchen"]),
        (["--tasks=kitchen,can_ph"], ["kitchen", "can_ph"]),
    ],
)
def test_uniform(evaluation: FakeEvaluation, flags: list[str], tasks: list[str]) -> None:
    for task in ("can_ph", "lift_mh", "kitchen"):
        add_checkpoint(task, 0, "latest.ckpt")
    argv = ["--steps=20", "--seeds=0", "--checkpoint_type=avg", "--output_dir=out", *flags]
    assert batch.main(["uniform", *argv]) == 0
    assert [Path(asked.checkpoint).parts[1] for asked in evaluation.runs] == tasks
    assert {asked.method.spec for asked in evaluation.runs} == {"uniform:20"}
    assert {(row[0], row[1]) for row in rows()[1:]} == {("Uniform", "20")}


def test_ablation(evaluation: FakeEvaluation, capsys: pytest.CaptureFixture[str]) -> None:
    add_checkpoint("can_ph", 0, "latest.ckpt")
    argv = ["--steps=10", "--seeds=0", "--checkpoint_type=avg", "--metric=l1"]
    assert batch.main(["ablation", *argv]) == 0
    assert [asked.method.spec for asked in evaluation.runs] == ["unified:10:l1", "blockwise:10:l1", "bac:10:5:l1"]
    output_dir = Path("results/ablation_l1_10_bu5")
    assert [(row[0], row[1]) for row in rows(str(output_dir))[1:]] == [
        ("Plain", "100"),
        ("Unified ACS", "10"),
        ("Block-wise ACS", "10"),
        ("BAC", "10"),
    ]
    assert (output_dir / "bac_10_5_l1" / "can_ph" / "seed0_avg" / "eval_results.json").is_file()
    assert "block-wise ACS 10 (l1)" in capsys.readouterr().out
    assert batch.main(["ablation", *argv, "--num_bu_blocks=0"]) == 2
    assert "--num_bu_blocks 0" in capsys.readouterr().err


def test_a_plain_policy_that_fails_is_tried_once(evaluation: FakeEvaluation) -> None:
    for seed in (0, 2):
        add_checkpoint("can_ph", seed, "latest.ckpt")
    assert batch.main(["ablation", "--steps=10", "--seeds=0,2", "--checkpoint_type=avg"]) == 1
    assert [asked.training_seed for asked in evaluation.plain_runs] == [0, 2]
    assert [asked.training_seed for asked in evaluation.runs] == [0, 0, 0]


def test_shell_script_end_to_end(workspace: Path, checkpoint: Path) -> None:
    """The real thing, on the small checkpoint: one that works, one that is damaged."""
    add_checkpoint("pusht", 0, "latest.ckpt", source=checkpoint)
    add_checkpoint("pusht", 1, "latest.ckpt")
    write_tiny_steps(workspace / "assets" / "pusht" / "original" / "optimal_steps" / "cosine", checkpoint)
    argv = "--device cpu --steps 3 --metric cosine --seeds 0,1 --num_bu_blocks 0 --checkpoint_type avg --n_test 1"
    shell = shutil.copytree(REPOSITORY / "shell", workspace / "shell") / "main"
    command = ["bash", shell / "run_bac_all.sh", *argv.split(), "--output_dir=out", "--latency_calls=2"]
    environment = {**os.environ, "BACINFER_VENV": sys.prefix}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stderr
    assert "seed 1 avg failed" in result.stderr
    (row,) = rows()[1:]
    assert row[:5] == ["BAC", "3", "pusht", "0", "avg"]
    assert 0 <= float(row[5]) <= 1
    assert int(row[6]) > 0
    assert float(row[7]) > 0
    assert json.loads(Path("out/pusht/seed0_avg/eval_results.json").read_text())["num_caches"] == 3

    for script in ("run_uniform_all.sh", "ablation_bac.sh"):
        help_text = subprocess.check_output(["bash", shell / script, "--help"], env=environment, text=True)
        assert f"usage: {script}" in help_text
