"""The log of a training run: one JSON object a line, and a picture of the loss."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bacinfer import files


class TrainingLog:
    """Appends entries, each with its ``global_step``, to ``path``; resuming drops those of steps to be repeated.

    Raises:
        ValueError: a line of the log is no entry. What a killed run left without its line break is dropped.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        if resume_step > 0 and path.exists():
            self.entries = [entry for entry in _read(path) if entry["global_step"] <= resume_step]
        files.write_text(path, "".join(json.dumps(entry) + "\n" for entry in self.entries))

    def add(self, **entry: Any) -> None:
        self.entries.append(entry)
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def plot(self, path: Path) -> None:
        """Draw the training loss over the steps, and the scores of rollouts if there are any."""
        from matplotlib.figure import Figure

        losses, scores = self._series("train_loss"), self._series("train_mean_score")
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(*losses)
        axes.set(xlabel="training step", ylabel="training loss", yscale="log")
        if scores[0]:
            score_axes = axes.twinx()
            score_axes.plot(*scores, "o--", color="tab:green")
            score_axes.set_ylabel("mean score on training seeds", color="tab:green")
            score_axes.set_ylim(0, 1.05)
        with files.atomic_write(path) as temporary:
            figure.savefig(temporary)

    def _series(self, name: str) -> tuple[list[int], list[float]]:
        """The steps and values of those entries that have it."""
        entries = [entry for entry in self.entries if name in entry]
        return [entry["global_step"] for entry in entries], [entry[name] for entry in entries]


def _read(path: Path) -> Iterator[dict[str, Any]]:
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        entry = files.parse_json(line, path, number)
        if not isinstance(entry, dict) or not isinstance(entry.get("global_step"), int):
            raise ValueError(f"{path}, line {number}: expected an entry with its global_step, found {entry!r:.80}")
        yield entry
