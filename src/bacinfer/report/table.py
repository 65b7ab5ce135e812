"""Tables for the terminal and for Markdown."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args, get_type_hints

from bacinfer.experiments.store import Row
from bacinfer.files import atomic_write
from bacinfer.measurement.latency import divided
from bacinfer.measurement.statistics import CONFIDENCE
from bacinfer.measurement.tables import format_table
from bacinfer.tasks.table import TASKS

METHOD_HEADER = [
    *("method", "score ± s.e.", "difference to plain", "action error", "GFLOPs"),
    *("p50 / p95 / p99, ms", "actions/s", "speedup", "encoder + denoising, ms", "peak MB", "policy + rest, s"),
]


def method_cells(row: Row) -> list[str]:
    """A row under `METHOD_HEADER`."""
    score = "-" if row.score is None else f"{row.score:.3f}"
    score += "" if row.score_standard_error is None else f" ± {row.score_standard_error:.3f}"
    difference = "-" if row.score_difference is None or row.method == "plain" else f"{row.score_difference:+.3f}"
    if difference != "-" and row.score_difference_low is not None:
        difference += f" [{row.score_difference_low:+.3f}, {row.score_difference_high:+.3f}]"
    return [
        row.label,
        score,
        difference,
        f"{row.action_error:.3f}",
        f"{row.flops / 1e9:.3f}",
        " / ".join(f"{1e3 * seconds:.1f}" for seconds in (row.latency_p50, row.latency_p95, row.latency_p99)),
        f"{row.actions_per_second:.1f}",
        f"{row.speedup:.2f}x",
        divided(row.encoder_p50, row.denoising_p50),
        "-" if row.peak_memory is None else f"{row.peak_memory / 1e6:.0f}",
        f"{row.policy_seconds:.1f} + {row.env_seconds:.1f}",
    ]


def episodes_text(row: Row) -> str:
    """Which episodes a row is about."""
    return f"{row.n_test} {'disturbed episodes' if row.disturb else 'episodes'} from seed {row.first_episode_seed}"


def format_methods(rows: Sequence[Row], *, markdown: bool = False) -> str:
    """Rows of one checkpoint as a table, and below it what the figures are."""
    first = rows[0]
    lines = [
        format_table(METHOD_HEADER, [method_cells(row) for row in rows], markdown=markdown),
        "",
        f"{episodes_text(first)}. Score: mean of the episodes' highest rewards; "
        f"score difference, paired over {first.n_test} seeds: with its {CONFIDENCE:.0%} interval (where all pairs are "
        "equal, what so many leave open: the rule of three); policy + rest: time of all episodes.",
        f"Action error: RMS, normalised units, same noise; between two draws of the plain policy's noise it is "
        f"{first.noise_error:.3f}.",
        f"Latency: {first.latency_calls} calls at batch 1, {first.threads} threads, {first.hardware}; speedup: against "
        "the plain policy, timed just before; encoder: what calls take before and after the denoising loop, medians.",
        *notes(rows),
    ]
    return "\n".join(lines)


def notes(rows: Iterable[Row]) -> Iterable[str]:
    """What the table has no column for: results of a task's parts, crashed episodes, and tasks that judge nothing."""
    rows = list(rows)
    for name in dict.fromkeys(row.task for row in rows if row.task in TASKS):
        if TASKS[name].smoke_test:
            yield f"{name} is a smoke test ({TASKS[name].smoke_test}): it tells no method from another."
    for row in rows:
        if row.sub_scores:
            parts = []
            for name, score in row.sub_scores.items():
                low, high = score["interval_95"]
                parts.append(f"{name} {score['mean']:.3f} [{low:.3f}, {high:.3f}]")
            yield f"{row.label}: {', '.join(parts)}"
        if row.num_failed:
            yield f"{row.label}: {row.num_failed} episodes crashed and are left out, see {row.directory}/scores.json"


def export_csv(path: Path, rows: Iterable[Row]) -> None:
    """Writes all that rows hold as a CSV file, for other programs; nothing reads it back."""
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        writer.writerows(map(_record, rows))


def export_parquet(path: Path, rows: Iterable[Row]) -> None:
    """Writes the same as a Parquet file, whose columns have the types of `Row`.

    Raises:
        RuntimeError: PyArrow is missing.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise RuntimeError("Parquet files need PyArrow: pip install 'bacinfer[parquet]'") from error
    schema = pa.schema([(name, _arrow_type(kind)) for name, kind in _COLUMNS.items()])
    with atomic_write(path) as temporary:
        parquet.write_table(pa.Table.from_pylist(list(map(_record, rows)), schema), temporary)


_COLUMNS: dict[str, Any] = {**get_type_hints(Row), "directory": str}
_ARROW_TYPES = {str: "string", int: "int64", float: "float64", bool: "bool", dict: "string"}


def _arrow_type(kind: Any) -> str:
    """What Arrow calls a type of `Row`, which may be None, too; of a dict that of its JSON."""
    return next(name for type_, name in _ARROW_TYPES.items() if type_ in (kind, *get_args(kind)))


def _record(row: Row) -> dict[str, Any]:
    sub_scores = None if row.sub_scores is None else json.dumps(row.sub_scores)
    return {**asdict(row), "sub_scores": sub_scores, "directory": row.directory}
