"""The table of a batch, as BACInfer's users know it, and for people."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from bacinfer.experiments.jobs import JobResult
from bacinfer.files import atomic_write
from bacinfer.measurement.tables import format_table

CSV_HEADER = ("Method", "Steps", "Task", "Seed", "CheckpointType", "SuccessRate", "FLOPs", "Speedup")


def write_csv(path: Path, results: Sequence[JobResult]) -> None:
    """All results so far, one line for each; a task with several metrics has a line for each of them."""
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_HEADER)
        for result in results:
            job, row = result.job, result.row
            if row is None:
                continue
            steps = row.num_inference_steps if job.method.num_caches is None else job.method.num_caches
            for name, score in result.scores.items():
                what = (job.method_name, steps, name, *job.origin)
                writer.writerow((*what, f"{score:.4f}", row.flops, f"{row.speedup:.3f}"))


def batch_table(results: Sequence[JobResult], *, markdown: bool = False) -> str:
    lines = []
    for result in results:
        job, row = result.job, result.row
        what = [*job.origin, result.status, job.method.label]
        if row is None:
            lines.append([job.task.name, *what, "-", "-", "-"])
            continue
        figures = [f"{row.flops / 1e9:.3f}", f"{row.speedup:.2f}x"]
        lines += [[name, *what, f"{score:.3f}", *figures] for name, score in result.scores.items()]
    header = ["task", "seed", "checkpoint", "status", "method", "score", "GFLOPs", "speedup"]
    return format_table(header, lines, markdown=markdown)
