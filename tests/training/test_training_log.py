from __future__ import annotations

import json
from pathlib import Path

import pytest

from bacinfer.training.log import TrainingLog


def steps(path: Path) -> list[int]:
    return [json.loads(line)["global_step"] for line in path.read_text().splitlines()]


def test_resuming_drops_what_will_be_repeated(tmp_path: Path) -> None:
    path = tmp_path / "logs.jsonl"
    log = TrainingLog(path)
    for step in (10, 20, 30):
        log.add(global_step=step, train_loss=1 / step)
    assert steps(path) == [10, 20, 30]
    log = TrainingLog(path, resume_step=20)
    log.add(global_step=25, train_loss=0.1)
    assert steps(path) == [10, 20, 25]
    log.plot(tmp_path / "loss.png")
    without_scores = (tmp_path / "loss.png").read_bytes()
    log.add(global_step=25, train_mean_score=0.5)
    log.plot(tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes() != without_scores
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_killed_run_left_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "logs.jsonl"
    path.write_text('{"global_step": 10}\n{"global_step": 20}\n{"global_st')
    TrainingLog(path, resume_step=20).add(global_step=30)
    assert steps(path) == [10, 20, 30]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"Epoch 3", "this is no JSON"),
        (b"", "this is no JSON"),
        (b"\xff", "this is no JSON"),
        (b"[" * 100_000, "this is no JSON"),
        (b'{"loss": 1}', "expected an entry with its global_step, found"),
        (b"[20]", "expected an entry"),
        (b'{"global_step": "20"}', "expected an entry"),
    ],
)
def test_a_foreign_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "logs.jsonl"
    content = b'{"global_step": 10}\n' + line + b'\n{"global_step": 30}\n'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path}, line 2: {message}"):
        TrainingLog(path, resume_step=20)
    assert path.read_bytes() == content


def test_a_new_run_starts_a_new_log(tmp_path: Path) -> None:
    path = tmp_path / "logs.jsonl"
    TrainingLog(path).add(global_step=10)
    TrainingLog(path)
    assert steps(path) == []
