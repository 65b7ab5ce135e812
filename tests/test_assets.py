from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from bacinfer import assets


def test_paths_are_those_of_the_reference() -> None:
    run = assets.RunAssets(Path("assets/pusht/original"))
    steps = assets.steps_file(run.steps_dir("cosine"), "decoder.layers.0.dropout1", 10, "cosine")
    assert str(steps) == (
        "assets/pusht/original/optimal_steps/cosine/decoder.layers.0.dropout1/"
        "optimal_steps_decoder.layers.0.dropout1_10_cosine.pkl"
    )
    assert str(run.selected_blocks(5)) == "assets/pusht/original/bu_block_selection/top_5_error_blocks.pkl"
    assert str(run.block_errors) == "assets/pusht/original/bu_block_selection/block_l1_errors.pkl"
    assert assets.RunAssets.of_steps_dir(run.steps_dir("l1")).directory == run.directory.resolve()


def test_steps_files_are_plain_pickles_with_json_beside_them(tmp_path: Path) -> None:
    path = assets.write_steps(tmp_path, "m.0.dropout1", "l1", np.array([0, 4, 9]), 100)  # type: ignore[arg-type]
    assert pickle.loads(path.read_bytes()) == [0, 4, 9]
    assert path.with_suffix(".txt").read_text() == "0 4 9\n"
    assert path.with_suffix(".json").read_text() == (
        '{"metric": "l1", "steps": [0, 4, 9], "num_steps": 3, "num_inference_steps": 100}\n'
    )
    assert assets.read_steps(path, 100) == [0, 4, 9]
    assert assets.available_steps(tmp_path) == [("l1", 3)]


@pytest.mark.parametrize("stored", [np.array([0, 2]), (0, 2), [np.int64(0), np.int32(2)]])
def test_steps_files_of_others_may_hold_arrays(tmp_path: Path, stored: object) -> None:
    path = tmp_path / "steps.pkl"
    path.write_bytes(pickle.dumps(stored))
    assert assets.read_steps(path, 10) == [0, 2]


def test_damaged_description_of_a_steps_file(tmp_path: Path) -> None:
    path = assets.write_steps(tmp_path, "m", "l1", [0], 100)
    path.with_suffix(".json").write_text("{")
    with pytest.raises(ValueError, match="line 1: this is no JSON"):
        assets.read_steps(path, 100)


@pytest.mark.parametrize(
    "stored",
    [[0, "2"], [0, 2.0], [0, None], [0, [2]], [True], np.array(3), np.array([[0, 2]]), np.array([0.5]), {0: 2}],
)
def test_steps_files_of_other_things(tmp_path: Path, stored: object) -> None:
    path = tmp_path / "steps.pkl"
    path.write_bytes(pickle.dumps(stored))
    with pytest.raises(
        ValueError, match=r"steps\.pkl: (expected a list of update steps|update steps must be integers), found"
    ):
        assets.read_steps(path, 10)


@pytest.mark.parametrize("text", ["[" * 10**5, "{", b"\xff", "1" * 10**5, '{"num_inference_steps": ' + "[" * 10**5])
def test_a_description_without_end_is_a_clear_error(tmp_path: Path, text: str | bytes) -> None:
    path = assets.write_steps(tmp_path, "m", "l1", [0], 100)
    path.with_suffix(".json").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ValueError, match=r"m_1_l1\.json is not valid JSON") as error:
        assets.read_steps(path, 100)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("value", [10**400, float("nan"), float("inf"), "1", None, 1j, np.complex64(1), np.ones(2)])
def test_block_errors_are_finite_numbers(tmp_path: Path, value: object) -> None:
    path = tmp_path / "errors.pkl"
    path.write_bytes(pickle.dumps({"a": value}))
    with pytest.raises(ValueError, match=r"errors\.pkl"):
        assets.read_block_errors(path)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_is_read(tmp_path: Path, protocol: int) -> None:
    data = {
        "lists": [1, 2.5, "text", None, True, (1, b"bytes")],
        "arrays": np.arange(6, dtype=np.float32).reshape(2, 3),
        "scalar": np.float64(0.5),
        "tensors": [torch.arange(4.0), torch.zeros(2, dtype=torch.float16)],
    }
    path = tmp_path / "data.pkl"
    path.write_bytes(pickle.dumps(data, protocol))
    read = assets.read_pickle(path)
    assert read["lists"] == data["lists"]
    assert np.array_equal(read["arrays"], data["arrays"])
    assert read["scalar"] == 0.5
    assert all(torch.equal(a, b) for a, b in zip(read["tensors"], data["tensors"], strict=True))


class Call:
    def __init__(self, function: object, *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize(
    ("hostile", "named"),
    [
        (Call(os.system, "touch executed"), "system"),
        (Call(eval, "open('executed', 'w')"), "eval"),
        (Call(getattr, os, "system"), "getattr"),
        (Path("x"), "pathlib"),
        (torch.nn.Linear(1, 1), "torch"),
    ],
)
def test_nothing_else_is_unpickled(tmp_path: Path, monkeypatch, hostile: object, named: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile.pkl"
    try:
        path.write_bytes(pickle.dumps({"a": [hostile]}))
    except TypeError:  # modules cannot be pickled, so name the function directly
        path.write_bytes(b"cbuiltins\ngetattr\n.")
    with pytest.raises(ValueError, match=named) as error:
        assets.read_pickle(path)
    assert str(path) in str(error.value)
    assert not (tmp_path / "executed").exists()


def test_pickled_storage_cannot_smuggle_code(tmp_path: Path, monkeypatch) -> None:
    # A tensor's storage is pickled as bytes that are themselves unpickled.
    monkeypatch.chdir(tmp_path)
    inner = pickle.dumps(Call(os.system, "touch executed"))
    path = tmp_path / "hostile.pkl"
    path.write_bytes(pickle.dumps(Call(torch.storage._load_from_bytes, inner)))
    with pytest.raises(ValueError, match=r"hostile.pkl"):
        assets.read_pickle(path)
    assert not (tmp_path / "executed").exists()


def test_arrays_round_trip(tmp_path: Path) -> None:
    arrays = {"a.b/cosine": np.eye(3, dtype=np.float32), "c": np.zeros((0, 2), np.float16)}
    assets.write_arrays(tmp_path / "x" / "file.npz", arrays, {"demos": [1, 2]})
    read, metadata = assets.read_arrays(tmp_path / "x" / "file.npz")
    assert metadata == {"demos": [1, 2]}
    assert list(read) == list(arrays)
    assert all(np.array_equal(read[k], arrays[k]) and read[k].dtype == arrays[k].dtype for k in arrays)


def test_damaged_arrays(tmp_path: Path) -> None:
    path = tmp_path / "file.npz"
    with pytest.raises(FileNotFoundError):
        assets.read_arrays(path)
    assets.write_arrays(path, {"a": np.arange(1000)})
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match="not a complete"):
        assets.read_arrays(path)
    np.savez(path, a=np.array([Call(os.system, "touch executed")], dtype=object))
    with pytest.raises(ValueError, match="not a complete"):
        assets.read_arrays(path)


def test_arrays_that_are_none_or_unfold_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.npz"
    np.savez(path, a=np.array(["text"]))
    with pytest.raises(ValueError, match=r"file\.npz is not a complete .* where numbers are expected"):
        assets.read_arrays(path)
    for metadata in ("[1]", "[" * 10**5, "{"):
        np.savez(path, **{"metadata.json": np.array(metadata)})  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"file\.npz is not a complete"):
            assets.read_arrays(path)
    np.savez_compressed(path, a=np.zeros(10**6))
    with pytest.raises(ValueError, match=r"file\.npz is not a complete .*larger than the file"):
        assets.read_arrays(path)


@pytest.mark.parametrize(
    "content", [[1], {"m": [np.zeros(2), np.zeros(3)]}, {"m": "text"}, {"m": [object]}, {"m": torch.ones(2) + 1j}]
)
def test_activations_of_another_form(tmp_path: Path, content: object) -> None:
    path = tmp_path / "activations.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"activations.pkl"):
        assets.read_activations(tmp_path / "activations.npz")


def test_missing_activations(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="record them first"):
        assets.read_activations(tmp_path / "activations.npz")


def test_json_names_its_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    assets.write_json(path, {"a": [1, None]})
    assert assets.read_json(path) == {"a": [1, None]}
    path.write_text('{\n "a": 1,\n}')
    with pytest.raises(ValueError, match=rf"{path}, line [23]: this is no JSON"):
        assets.read_json(path)
    for content in (b"", b"\xff", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{path}, line 1: this is no JSON"):
            assets.read_json(path)


# -- writes ----------------------------------------------------------------------------------------------------------


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write_half() -> None:
        with assets.atomic_write(path) as temporary:
            temporary.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_half()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    path = assets.write_steps(tmp_path, "m", "l1", [0, 1], 10)

    def on_full_disk(data: object, file, protocol: int) -> None:  # type: ignore[no-untyped-def]
        file.write(pickle.dumps(data)[:3])
        with open("/dev/full", "wb") as full:
            full.write(b"x")

    monkeypatch.setattr(assets.pickle, "dump", on_full_disk)
    with pytest.raises(OSError, match="No space left"):
        assets.write_pickle(path, [0, 2])
    monkeypatch.undo()
    assert assets.read_steps(path, 10) == [0, 1]
    assert not list(tmp_path.rglob("*.part*"))


def writer(path: Path) -> subprocess.Popen[str]:
    """A process that is in the middle of writing, and goes on when it is written to."""
    code = textwrap.dedent(f"""
        from bacinfer import assets
        with assets.atomic_write({str(path)!r}) as temporary:
            temporary.write_text("half")
            print("writing", flush=True)
            input()
            temporary.unlink()  # as some writers do
            temporary.write_text("half and half")
    """)
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def test_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "steps.pkl"
    assets.write_pickle(path, [0, 1])
    process = writer(path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert assets.read_pickle(path) == [0, 1]
    assert len(list(tmp_path.iterdir())) == 2  # and what it left


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    path = tmp_path / "steps[1].pkl"
    killed, living = writer(path), writer(path)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    (tmp_path / "steps[1].pkl.notes.part").mkdir()  # of somebody else
    assert len(list(tmp_path.glob(".*.part"))) == 2
    assets.write_pickle(path, [0, 1])
    assert len(list(tmp_path.glob(".*.part"))) == 1
    assert living.stdin is not None
    living.communicate("go on")
    assert living.returncode == 0
    assert path.read_text() == "half and half"
    assert {entry.name for entry in tmp_path.iterdir()} == {"steps[1].pkl", "steps[1].pkl.notes.part"}


def test_a_directory_that_is_removed_before_its_lock_is_made_again(tmp_path: Path, monkeypatch) -> None:
    lock = assets._lock

    def remove_first(directory: Path, operation: int) -> int | None:
        monkeypatch.undo()
        directory.rmdir()
        return lock(directory, operation)

    monkeypatch.setattr(assets, "_lock", remove_first)
    assets.write_text(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"
    assert len(list(tmp_path.iterdir())) == 1


def test_file_systems_without_locks(tmp_path: Path, monkeypatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(assets.fcntl, "flock", no_locks)
    (tmp_path / ".file.abcdefgh.part").mkdir()  # whose writer may live
    assets.write_text(tmp_path / "file", "text")
    assert {entry.name for entry in tmp_path.iterdir()} == {"file", ".file.abcdefgh.part"}


def test_written_files_have_usual_permissions(tmp_path: Path) -> None:
    assets.write_pickle(tmp_path / "file", [0])
    (tmp_path / "plain").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert time.time() - (tmp_path / "file").stat().st_mtime < 60
