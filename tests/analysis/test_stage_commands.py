"""The stages as commands: from recorded residuals to matrices, update steps, selected blocks and reports."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bacinfer import assets, bacinfer_files
from bacinfer.analysis import activation_analysis, bu_block_selection, optimal_cache_scheduler
from bacinfer.analysis.recorded import read_matrices, read_residuals
from bacinfer.analysis.similarity import similarity
from bacinfer.commands import info as steps_report
from bacinfer.core.bubbling import block_error

MODULES = [f"decoder.layers.{layer}.dropout{n}" for layer in range(2) for n in (1, 2, 3)]
KEYS = [f"decoder.layers.{layer}_{kind}" for layer in range(2) for kind in ("sa_block", "mha_block", "ff_block")]
NUM_STEPS = 8


@pytest.fixture
def residuals() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {m: generator.normal(scale=1 + n, size=(NUM_STEPS, 1, 2, 3)) for n, m in enumerate(KEYS)}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "assets"


@pytest.fixture
def run(out: Path) -> assets.RunAssets:
    return assets.RunAssets(out / "pusht" / "original")


@pytest.fixture
def recorded(run: assets.RunAssets, residuals: dict[str, np.ndarray]) -> assets.RunAssets:
    assets.write_by_block(run.activations, residuals, KEYS)
    return run


def arguments(out: Path) -> list[str]:
    return ["-o", str(out), "-t", "pusht", "--cache_mode", "original"]


# -- matrices and schedules --------------------------------------------------------------------------------------


def test_analysis_then_scheduler(
    recorded: assets.RunAssets,
    out: Path,
    residuals: dict[str, np.ndarray],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert activation_analysis.main([*arguments(out), "--metrics", "l2,cosine"]) == 0
    matrices = read_matrices(recorded, "l2")
    assert list(matrices) == KEYS
    for block, matrix in matrices.items():
        rows = residuals[block].reshape(NUM_STEPS, -1)
        expected = np.linalg.norm(rows[:, None] - rows[None, :], axis=-1)
        np.testing.assert_allclose(matrix, expected, rtol=1e-6, atol=1e-6)

    directory = ["--similarity_matrices_dir", str(recorded.directory), "--metric", "l2"]
    capsys.readouterr()
    assert optimal_cache_scheduler.main([*directory, "--list_modules"]) == 0
    assert capsys.readouterr().out.split() == KEYS

    (steps,) = optimal_cache_scheduler.optimal_update_steps(matrices[KEYS[2]], [3], maximise=False).values()
    for name in (KEYS[2], MODULES[2]):  # a block has two names
        shutil.rmtree(recorded.directory / "optimal_steps", ignore_errors=True)
        assert optimal_cache_scheduler.main([*directory, "--module_name", name, "--num_caches", "3"]) == 0
        assert f"M = 3: {' '.join(map(str, steps))}" in capsys.readouterr().out
        stored = assets.read_schedule(recorded.steps_dir("l2"), 3, "l2")
        assert stored == assets.StoredSchedule("l2", 3, NUM_STEPS, {KEYS[2]: list(steps)})
    assert not bacinfer_files.steps_files(recorded.steps_dir("l2"), 3, "l2")
    flags = ["--module_name", MODULES[2], "--num_caches", "3", "--bacinfer_files"]
    assert optimal_cache_scheduler.main([*directory, *flags]) == 0
    (path,) = bacinfer_files.steps_files(recorded.steps_dir("l2"), 3, "l2").values()
    assert bacinfer_files.read_steps(path) == (list(steps), NUM_STEPS)


def test_matrices_of_bacinfer_are_read(run: assets.RunAssets) -> None:
    matrix = similarity_of_steps()
    run.directory.mkdir(parents=True)
    path = run.similarity_matrices.with_suffix(".pkl")
    path.write_bytes(pickle.dumps({MODULES[0]: {"cosine": matrix}, "head": {"cosine": matrix[:2, :2]}}))
    np.testing.assert_array_equal(read_matrices(run, "cosine")[KEYS[0]], matrix)
    with pytest.raises(ValueError, match=r"no similarity matrices of metric 'l1', only of \['cosine'\]"):
        read_matrices(run, "l1")


def similarity_of_steps() -> np.ndarray:
    steps = np.arange(NUM_STEPS)
    return np.exp(-np.abs(steps[:, None] - steps[None, :]))


def test_matrices_are_never_silently_replaced(
    recorded: assets.RunAssets, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert activation_analysis.main([*arguments(out), "--metrics", "l1"]) == 0
    assert activation_analysis.main([*arguments(out), "--metrics", "l2"]) == 2
    assert "--force" in capsys.readouterr().err
    assert list(read_matrices(recorded, "l1")) == KEYS
    assert activation_analysis.main([*arguments(out), "--metrics", "l2", "--force"]) == 0
    assert list(read_matrices(recorded, "l2")) == KEYS


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--metric", "cosin"], "unknown metric 'cosin'"),
        (["--metric", "mse"], "no similarity matrices of metric 'mse', only of ['cosine']"),
        ([], "--module_name is missing"),
        (["--module_name", "decoder"], "no block 'decoder'; "),
        (["--list_modules", "--module_name", MODULES[0]], "--list_modules only lists"),
        (["--list_modules", "--bacinfer_files"], "--list_modules only lists"),
        (["--list_modules", "--num_caches", "5"], "--list_modules only lists"),
        (["--module_name", MODULES[0], "--num_caches", "9"], "integer in 1..8"),
    ],
)
def test_mistakes_of_the_scheduler(
    recorded: assets.RunAssets, out: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    activation_analysis.main([*arguments(out), "--metrics", "cosine"])
    capsys.readouterr()
    assert optimal_cache_scheduler.main(["--similarity_matrices_dir", str(recorded.directory), *flags]) == 2
    assert message in capsys.readouterr().err


# -- bubbling union ----------------------------------------------------------------------------------------------


def test_selection(
    recorded: assets.RunAssets,
    out: Path,
    residuals: dict[str, np.ndarray],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert bu_block_selection.main([*arguments(out), "--num_blocks", "2"]) == 0
    errors = assets.read_block_errors(recorded)
    tensors = read_residuals(recorded)
    assert errors == {key: block_error(tensors[key]) for key in KEYS}
    for key in KEYS:
        pairs = similarity(tensors[key], ["l1"])["l1"][np.triu_indices(NUM_STEPS, k=1)]
        assert errors[key] == pytest.approx(pairs.mean() / residuals[key][0].size)
    # the last blocks were drawn with the largest scale
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[:2]] == [KEYS[5], KEYS[4]]
    assert not (recorded.directory / "bu_block_selection").exists()
    assert bu_block_selection.main([*arguments(out), "--num_blocks", "2", "--bacinfer_files"]) == 0
    selection = bacinfer_files.selection_file(recorded.directory, 2)
    assert list(pickle.loads(selection.read_bytes())) == [KEYS[5], KEYS[4]]
    assert pickle.loads(bacinfer_files.block_errors_file(recorded.directory).read_bytes()) == errors


def test_errors_are_kept_unless_forced(
    recorded: assets.RunAssets, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bacinfer_files.write_pickle(bacinfer_files.block_errors_file(recorded.directory), {KEYS[0]: 1.0})
    assert bu_block_selection.main([*arguments(out), "--num_blocks", "1"]) == 0
    assert "using" in capsys.readouterr().out
    assert bu_block_selection.main([*arguments(out), "--num_blocks", "1", "--force"]) == 0
    assert len(assets.read_block_errors(recorded)) == 6


@pytest.mark.parametrize("num_blocks", ["0", "7"])
def test_as_many_blocks_as_there_are_can_be_selected(
    recorded: assets.RunAssets, out: Path, capsys: pytest.CaptureFixture[str], num_blocks: str
) -> None:
    assert bu_block_selection.main([*arguments(out), "--num_blocks", num_blocks]) == 2
    assert "1..6" in capsys.readouterr().err


# -- what an assets directory may hold ---------------------------------------------------------------------------


@pytest.mark.parametrize("command", [activation_analysis.main, bu_block_selection.main])
def test_without_recordings_the_error_lists_what_is_there(
    run: assets.RunAssets, out: Path, capsys: pytest.CaptureFixture[str], command: object
) -> None:
    assert callable(command)
    assert command(arguments(out)) == 2
    assert "does not exist" in capsys.readouterr().err
    run.directory.mkdir(parents=True)
    assert command(arguments(out)) == 2
    assert "is empty" in capsys.readouterr().err
    (run.directory / "notes.txt").touch()
    assert command(arguments(out)) == 2
    assert "holds notes.txt" in capsys.readouterr().err


def test_recordings_of_bacinfer_are_read_but_for_modules_that_are_no_blocks(
    run: assets.RunAssets, residuals: dict[str, np.ndarray]
) -> None:
    run.directory.mkdir(parents=True)
    by_module = {module: residuals[key] for module, key in zip(MODULES, KEYS, strict=True)}
    everything = {**by_module, "decoder.layers.0.linear1": np.zeros((NUM_STEPS, 1, 2, 12)), "head": np.zeros((8, 2))}
    lists = {module: list(array) for module, array in everything.items()}  # one array a step
    run.activations.with_suffix(".pkl").write_bytes(pickle.dumps(lists))
    tensors = read_residuals(run)
    assert list(tensors) == KEYS
    for key in KEYS:
        np.testing.assert_array_equal(tensors[key].numpy(), residuals[key])


def test_recordings_without_blocks_are_refused(run: assets.RunAssets) -> None:
    run.directory.mkdir(parents=True)
    run.activations.with_suffix(".pkl").write_bytes(pickle.dumps({"head": np.zeros((8, 2))}))
    with pytest.raises(ValueError, match=r"no residual blocks: \['head'\]"):
        read_residuals(run)


class Hostile:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.trace),)


def test_a_hostile_recording_runs_nothing(
    run: assets.RunAssets, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "was_run"
    run.directory.mkdir(parents=True)
    run.activations.with_suffix(".pkl").write_bytes(pickle.dumps({MODULES[0]: Hostile(trace)}))
    assert activation_analysis.main(arguments(out)) == 2
    message = capsys.readouterr().err
    assert "activations.pkl" in message
    assert "mkdir" in message
    assert not trace.exists()


def test_recorded_nan_is_refused(
    run: assets.RunAssets,
    out: Path,
    residuals: dict[str, np.ndarray],
    capsys: pytest.CaptureFixture[str],
) -> None:
    residuals[KEYS[3]][5, 0, 1, 1] = np.nan
    assets.write_by_block(run.activations, residuals, KEYS)
    for command in (activation_analysis.main, bu_block_selection.main):
        assert command(arguments(out)) == 2
        last_line = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"{KEYS[3]}: the residual of denoising step 5" in last_line


# -- reports -----------------------------------------------------------------------------------------------------


@pytest.fixture
def scheduled(run: assets.RunAssets) -> assets.RunAssets:
    """Two layers with two updates each; bubbling union extends layer 0's self-attention."""
    steps = {key: [0, second] for second, key in enumerate(KEYS, start=1)}
    assets.write_schedules(run.steps_dir("l1"), [assets.StoredSchedule("l1", 2, NUM_STEPS, steps)])
    assets.write_block_errors(run, {key: -float(n) for n, key in enumerate(KEYS)})
    return run


def report(out: Path, kind: str, num_bu_blocks: str = "1", num_caches: str = "2") -> int:
    flags = ["--metric", "l1", "--num_caches", num_caches, "--num_bu_blocks", num_bu_blocks]
    return steps_report.main([kind, "--assets_dir", str(out), "--task", "pusht", *flags])


def test_a_smoke_test_is_called_so(capsys: pytest.CaptureFixture[str]) -> None:
    shipped = ["counts", "--assets_dir", str(Path(__file__).parents[2] / "assets"), "--num_caches", "10"]
    assert steps_report.main([*shipped, "--task", "drawer_open"]) == 0
    assert "drawer_open is a smoke test: two denoising steps solve it 50 times of 50" in capsys.readouterr().out
    assert steps_report.main([*shipped, "--task", "pusht"]) == 0
    assert "smoke test" not in capsys.readouterr().out


def test_steps_before_and_after_bubbling_union(
    scheduled: assets.RunAssets, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(out, "steps") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:4] == [KEYS[0], "  ACS      2: 0 1", "  as run   5: 0 1 3 6 7"]
    assert lines[4:7] == [KEYS[1], "  ACS      2: 0 2", "  as run   3: 0 2 7"]
    assert [line for line in lines if not line.startswith(" ")][1:] == KEYS


def test_counts_of_each_kind(scheduled: assets.RunAssets, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(out, "counts") == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[2:]}
    assert rows == {
        "sa_block": ["2.00", "4.00", "3", "5", "2"],
        "mha_block": ["2.00", "3.00", "3", "3", "2"],
        "ff_block": ["2.00", "3.00", "3", "3", "2"],
        "all": ["blocks", "2.00", "3.33", "3", "5", "6"],
    }


def test_reports_read_steps_of_bacinfer(run: assets.RunAssets, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = bacinfer_files.steps_file(run.steps_dir("l1"), MODULES[0], 2, "l1")
    path.parent.mkdir(parents=True)
    path.write_bytes(pickle.dumps([0, 50]))
    path.with_suffix(".json").write_text('{"metric": "l1", "steps": [0, 50], "num_steps": 2}')
    assert report(out, "steps", num_bu_blocks="0") == 0
    assert "as run   3: 0 50 99" in capsys.readouterr().out


def test_reports_say_what_is_there(scheduled: assets.RunAssets, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(out, "steps", num_caches="3") == 2
    assert "has those for l1 2" in capsys.readouterr().err
    scheduled.block_errors.unlink()
    assert report(out, "counts", num_bu_blocks="4") == 2
    assert f"no block_errors.json in {scheduled.directory}, which holds optimal_steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"num_inference', "line 1: this is no JSON"),
        ("[]", "expected the description of a schedule"),
        ('{"num_inference_steps": "many"}', "expected the description of a schedule"),
    ],
)
def test_a_foreign_description(
    scheduled: assets.RunAssets, out: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    (scheduled.steps_dir("l1") / "schedules.json").unlink()
    path = bacinfer_files.write_steps(scheduled.steps_dir("l1"), KEYS[0], "l1", [0, 1], NUM_STEPS).with_suffix(".json")
    path.write_text(content)
    assert report(out, "steps") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line
    assert message in line


# -- the shell scripts -------------------------------------------------------------------------------------------


def shell(script: str, *flags: str) -> subprocess.CompletedProcess[str]:
    path = Path(__file__).parents[2] / "shell" / "get_steps" / script
    environment = {**os.environ, "BACINFER_VENV": sys.prefix}
    return subprocess.run(["bash", str(path), *flags], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("script", "expected"),
    [("get_steps_info.sh", "as run   5: 0 1 3 6 7"), ("get_practical_steps.sh", "mha_block       2.00    3.00")],
)
def test_scripts_report(scheduled: assets.RunAssets, out: Path, script: str, expected: str) -> None:
    flags = ["--assets_dir", str(out), "--task", "pusht", "--num_caches", "2", "--metric", "l1", "--num_bu_blocks", "1"]
    result = shell(script, *flags)
    assert (result.returncode, result.stderr) == (0, "")
    assert expected in result.stdout


def test_the_script_of_all_tasks_passes_its_flags_on() -> None:
    result = shell("get_optimal_steps.sh", "--task", "juggling", "--num_caches", "5,8", "--no_force")
    assert result.returncode == 2
    assert "juggling" in result.stderr
