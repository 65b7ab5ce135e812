"""Whole files or none: arrays, JSON, atomic writes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from bacinfer import files


class Call:
    """Pickles as a call."""

    def __init__(self, function: object, *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple:
        return self.call


def test_numbers_stand_in_one_line(tmp_path: Path) -> None:
    data = {"steps": [0, 5, 10], "empty": [], "text": ["[1, 2]", "3"], "nested": [[1], [2, 3]]}
    files.write_json(tmp_path / "file.json", data)
    assert '"steps": [0, 5, 10],' in (tmp_path / "file.json").read_text()
    assert files.read_json(tmp_path / "file.json") == data


def test_arrays_round_trip(tmp_path: Path) -> None:
    arrays = {"a.b/cosine": np.eye(3, dtype=np.float32), "c": np.zeros((0, 2), np.float16)}
    files.write_arrays(tmp_path / "x" / "file.npz", arrays, {"demos": [1, 2]})
    read, metadata = files.read_arrays(tmp_path / "x" / "file.npz")
    assert metadata == {"demos": [1, 2]}
    assert list(read) == list(arrays)
    assert all(np.array_equal(read[k], arrays[k]) and read[k].dtype == arrays[k].dtype for k in arrays)


def test_damaged_arrays(tmp_path: Path) -> None:
    path = tmp_path / "file.npz"
    with pytest.raises(FileNotFoundError):
        files.read_arrays(path)
    files.write_arrays(path, {"a": np.arange(1000)})
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match="not a complete"):
        files.read_arrays(path)
    np.savez(path, a=np.array([Call(os.system, "touch executed")], dtype=object))
    with pytest.raises(ValueError, match="not a complete"):
        files.read_arrays(path)


def test_arrays_that_are_none_or_unfold_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.npz"
    np.savez(path, a=np.array(["text"]))
    with pytest.raises(ValueError, match=r"file\.npz is not a complete .* where numbers are expected"):
        files.read_arrays(path)
    for metadata in ("[1]", "[" * 10**5, "{"):
        np.savez(path, **{"metadata.json": np.array(metadata)})  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"file\.npz is not a complete"):
            files.read_arrays(path)
    np.savez_compressed(path, a=np.zeros(10**7))
    with pytest.raises(ValueError, match=r"file\.npz is not a complete .*larger than the file"):
        files.read_arrays(path)


def test_json_names_its_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    files.write_json(path, {"a": [1, None]})
    assert files.read_json(path) == {"a": [1, None]}
    path.write_text('{\n "a": 1,\n}')
    with pytest.raises(ValueError, match=rf"{path}, line [23]: this is no JSON"):
        files.read_json(path)
    for content in (b"", b"\xff", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{path}, line 1: this is no JSON"):
            files.read_json(path)


# -- writes ----------------------------------------------------------------------------------------------------------


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write_half() -> None:
        with files.atomic_write(path) as temporary:
            temporary.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_half()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    files.write_json(path, [0, 1])

    def write_on_full_disk() -> None:
        with files.atomic_write(path) as temporary:
            temporary.write_text("[0")
            with open("/dev/full", "wb") as full:
                full.write(b"x")

    with pytest.raises(OSError, match="No space left"):
        write_on_full_disk()
    assert files.read_json(path) == [0, 1]
    assert not list(tmp_path.rglob("*.part*"))


def writer(path: Path) -> subprocess.Popen[str]:
    """A process that is in the middle of writing, and goes on when it is written to."""
    code = textwrap.dedent(f"""
        from bacinfer import files
        with files.atomic_write({str(path)!r}) as temporary:
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
    path = tmp_path / "steps.json"
    files.write_json(path, [0, 1])
    process = writer(path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert files.read_json(path) == [0, 1]
    assert len(list(tmp_path.iterdir())) == 2  # and what it left


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    path = tmp_path / "steps[1].json"
    killed, living = writer(path), writer(path)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    (tmp_path / "steps[1].json.notes.part").mkdir()  # of somebody else
    assert len(list(tmp_path.glob(".*.part"))) == 2
    files.write_json(path, [0, 1])
    assert len(list(tmp_path.glob(".*.part"))) == 1
    assert living.stdin is not None
    living.communicate("go on")
    assert living.returncode == 0
    assert path.read_text() == "half and half"
    assert {entry.name for entry in tmp_path.iterdir()} == {"steps[1].json", "steps[1].json.notes.part"}


def test_a_directory_that_is_removed_before_its_lock_is_made_again(tmp_path: Path, monkeypatch) -> None:
    lock = files.lock_directory

    def remove_first(directory: Path) -> int | None:
        monkeypatch.undo()
        directory.rmdir()
        return lock(directory)

    monkeypatch.setattr(files, "lock_directory", remove_first)
    files.write_text(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"
    assert len(list(tmp_path.iterdir())) == 1


def test_file_systems_without_locks(tmp_path: Path, monkeypatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    (tmp_path / ".file.abcdefgh.part").mkdir()  # whose writer may live
    files.write_text(tmp_path / "file", "text")
    assert {entry.name for entry in tmp_path.iterdir()} == {"file", ".file.abcdefgh.part"}


def test_written_files_have_usual_permissions(tmp_path: Path) -> None:
    files.write_json(tmp_path / "file", [0])
    (tmp_path / "plain").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert time.time() - (tmp_path / "file").stat().st_mtime < 60
