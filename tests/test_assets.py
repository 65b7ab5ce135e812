"""An assets directory: schedules, errors and recordings by block key, however they were written."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bacinfer import assets, bacinfer_files, files
from bacinfer.assets import RunAssets, StoredSchedule

BLOCKS = ["decoder.layers.0_sa_block", "decoder.layers.0_mha_block", "blocks.0_gate"]
MODULES = ["decoder.layers.0.dropout1", "decoder.layers.0.dropout2", "blocks.0.mlp"]


@pytest.fixture
def steps_dir(tmp_path: Path) -> Path:
    return RunAssets(tmp_path).steps_dir("l1")


def schedule(num_caches: int = 3, metric: str = "l1", K: int = 10, second: int = 4) -> StoredSchedule:
    return StoredSchedule(metric, num_caches, K, {block: [0, second, second + n + 1] for n, block in enumerate(BLOCKS)})


# -- schedules -------------------------------------------------------------------------------------------------------


def test_all_schedules_of_a_directory_lie_in_one_file(steps_dir: Path) -> None:
    three, four = schedule(), StoredSchedule("l1", 4, 10, {BLOCKS[2]: [0, 1, 2, 3]})
    assert assets.write_schedules(steps_dir, [four]) == assets.write_schedules(steps_dir, [three])
    assert [path.name for path in steps_dir.iterdir() if not path.name.startswith(".")] == ["schedules.json"]
    assert assets.read_schedule(steps_dir, 3, "l1") == three
    assert assets.read_schedule(steps_dir, 4, "l1") == four
    assert assets.read_schedule(steps_dir, 4, "cosine") is None
    assert assets.available_schedules(steps_dir) == [("l1", 3), ("l1", 4)]
    assert list(three.update_steps) == BLOCKS  # in the order of the forward
    assert f'"{BLOCKS[2]}": [0, 4, 7]' in (steps_dir / "schedules.json").read_text()


def test_a_schedule_takes_the_place_of_the_one_before(steps_dir: Path) -> None:
    assets.write_schedules(steps_dir, [schedule(K=20), schedule(4)])
    assets.write_schedules(steps_dir, [schedule(second=5)])
    assert assets.read_schedule(steps_dir, 3, "l1") == schedule(second=5)
    assert assets.read_schedule(steps_dir, 4, "l1") == schedule(4)


def test_a_block_is_added_to_its_schedule(steps_dir: Path) -> None:
    assets.write_schedules(steps_dir, [schedule()])
    assets.write_block_steps(steps_dir, "own", "l1", (0, 8, 9), 10)
    assets.write_block_steps(steps_dir, "own", "l1", (0, 9), 10)
    stored = assets.read_schedule(steps_dir, 3, "l1")
    assert stored is not None
    assert stored.update_steps == {**schedule().update_steps, "own": [0, 8, 9]}
    before = (steps_dir / "schedules.json").read_bytes()
    with pytest.raises(ValueError, match=r"schedules.json: .* K = 10 denoising steps, the steps of own are of 20"):
        assets.write_block_steps(steps_dir, "own", "l1", (0, 8, 9), 20)
    assert (steps_dir / "schedules.json").read_bytes() == before


def test_what_the_file_lacks_is_read_from_bacinfers_files(steps_dir: Path) -> None:
    bacinfer_files.write_steps(steps_dir, BLOCKS[0], "l1", [0, 1], 10)
    bacinfer_files.write_steps(steps_dir, BLOCKS[1], "l1", [0, 2], 10)
    (steps_dir / "head").mkdir()
    (steps_dir / "head" / "optimal_steps_head_2_l1.pkl").write_bytes(b"of no block, so never opened")
    assert assets.read_schedule(steps_dir, 2, "l1") == StoredSchedule(
        "l1", 2, 10, {BLOCKS[0]: [0, 1], BLOCKS[1]: [0, 2]}
    )
    assets.write_block_steps(steps_dir, BLOCKS[1], "l1", [0, 5], 10)
    stored = assets.read_schedule(steps_dir, 2, "l1")
    assert stored is not None
    assert stored.update_steps == {BLOCKS[0]: [0, 1], BLOCKS[1]: [0, 5]}
    assert assets.available_schedules(steps_dir) == [("l1", 2)]
    bacinfer_files.write_steps(steps_dir, BLOCKS[0], "l1", [0, 1], 20)
    with pytest.raises(ValueError, match=r"different numbers of denoising steps, K = \[10, 20\]"):
        assets.read_schedule(steps_dir, 2, "l1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "expected schedules of version 1"),
        ({"schedules": {}}, "expected schedules of version 1"),
        ({"schedules": [[]]}, "expected schedules with metric"),
        ({"schedules": [{"metric": "l1", "num_caches": True, "num_inference_steps": 5}]}, "expected schedules with"),
        ({"schedules": [{"metric": "l1", "num_caches": 2, "num_inference_steps": 5, "update_steps": {"a": [0, 0.5]}}]},
         "a: expected a list of update steps, found list"),
        ({"schedules": 2 * [{"metric": "l1", "num_caches": 2, "num_inference_steps": 5, "update_steps": {}}]}, "two"),
    ],
)  # fmt: skip
def test_a_foreign_file_is_refused_and_left(steps_dir: Path, change: dict[str, Any], message: str) -> None:
    path = assets.write_schedules(steps_dir, [])
    content = json.dumps({**json.loads(path.read_text()), **change})
    path.write_text(content)
    for use in (lambda: assets.read_schedule(steps_dir, 3, "l1"), lambda: assets.write_schedules(steps_dir, [])):
        with pytest.raises(ValueError, match=message) as error:
            use()
        assert str(path) in str(error.value)
    assert path.read_text() == content


def test_processes_that_write_at_once_lose_nothing(steps_dir: Path) -> None:
    code = textwrap.dedent(f"""
        import sys
        from bacinfer import assets
        first = int(sys.argv[1])
        print("ready", flush=True)
        input()
        for M in range(first, first + 8):
            schedule = assets.StoredSchedule("l1", M, 99, {{"block": list(range(M))}})
            assets.write_schedules({str(steps_dir)!r}, [schedule])
    """)
    command = [sys.executable, "-c", code]
    writers = [
        subprocess.Popen([*command, first], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for first in ("1", "31")
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    found = [M for _, M in assets.available_schedules(steps_dir)]
    assert found == [*range(1, 9), *range(31, 39)]


# -- block errors ----------------------------------------------------------------------------------------------------


def test_block_errors(tmp_path: Path) -> None:
    run = RunAssets(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no block_errors.json in .*, which is empty"):
        assets.read_block_errors(run)
    bacinfer_files.write_pickle(bacinfer_files.block_errors_file(tmp_path), {BLOCKS[0]: 1.5})
    assert assets.read_block_errors(run) == {BLOCKS[0]: 1.5}
    errors = {BLOCKS[2]: 0.1 + 0.2, BLOCKS[0]: 3}
    assets.write_block_errors(run, errors)
    assert list(assets.read_block_errors(run).items()) == list(errors.items())
    run.block_errors.write_text('{"version": 1, "block_errors": {"a": NaN}}')
    with pytest.raises(ValueError, match=rf"{run.block_errors}: expected a dict from block keys to errors"):
        assets.read_block_errors(run)


# -- recordings and matrices -----------------------------------------------------------------------------------------


def test_files_of_earlier_versions_name_modules(tmp_path: Path) -> None:
    run = RunAssets(tmp_path)
    residuals = {module: np.full((4, 2), n, np.float32) for n, module in enumerate(MODULES)}
    blocks = dict(zip(MODULES, BLOCKS, strict=True))
    files.write_arrays(run.activations, residuals, {"blocks": blocks, "source": {"demo_idx": 3}})
    read = assets.read_activations(run)
    assert list(read) == BLOCKS
    assert all(np.array_equal(read[blocks[module]], array) for module, array in residuals.items())
    assert assets.read_by_block(run.activations)[1]["source"] == {"demo_idx": 3}
    matrices = {f"{module}/l1": np.full((4, 4), n) for n, module in enumerate(MODULES)}
    errors = {f"{module}/block_error": np.array(1.0) for module in MODULES}
    files.write_arrays(run.similarity_matrices, {**matrices, **errors}, {"blocks": blocks})
    found = assets.read_matrices(run)
    assert {block: {name: matrix[0, 0] for name, matrix in by.items()} for block, by in found.items()} == {
        block: {"l1": n} for n, block in enumerate(BLOCKS)
    }


def test_arrays_that_do_not_say_their_blocks_are_refused(tmp_path: Path) -> None:
    run = RunAssets(tmp_path)
    for path, read in ((run.activations, assets.read_activations), (run.similarity_matrices, assets.read_matrices)):
        files.write_arrays(path, {"decoder.layers.0.dropout1": np.zeros((2, 2))})
        with pytest.raises(ValueError, match=rf"{path} was not written by this analysis"):
            read(run)


def test_the_steps_directory_leads_to_its_run() -> None:
    run = RunAssets(Path("assets/pusht/original"))
    assert RunAssets.of_steps_dir(run.steps_dir("l1")).directory == run.directory.resolve()
