from __future__ import annotations

import json
from pathlib import Path

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


def test_a_new_run_starts_a_new_log(tmp_path: Path) -> None:
    path = tmp_path / "logs.jsonl"
    TrainingLog(path).add(global_step=10)
    TrainingLog(path)
    assert steps(path) == []
