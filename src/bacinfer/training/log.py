"""The log of a training run: one JSON object a line, and a picture of the loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bacinfer import assets


class TrainingLog:
    """Appends entries, each with its ``global_step``, to ``path``; resuming drops those of steps to be repeated."""

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        if resume_step > 0 and path.exists():
            lines = map(json.loads, path.read_text().splitlines())
            self.entries = [entry for entry in lines if entry["global_step"] <= resume_step]
        assets.write_text(path, "".join(json.dumps(entry) + "\n" for entry in self.entries))

    def add(self, **entry: Any) -> None:
        self.entries.append(entry)
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def plot(self, path: Path) -> None:
        """Draw the training loss over the steps."""
        from matplotlib.figure import Figure

        points = [(entry["global_step"], entry["train_loss"]) for entry in self.entries if "train_loss" in entry]
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot([step for step, _ in points], [loss for _, loss in points])
        axes.set(xlabel="training step", ylabel="noise prediction error (MSE)", yscale="log")
        with assets.atomic_write(path) as temporary:
            figure.savefig(temporary)
