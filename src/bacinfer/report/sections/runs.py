"""The table of all runs, and the facts about them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bacinfer.experiments.method import SAMPLER_NAMES
from bacinfer.experiments.store import Row
from bacinfer.report.sections.shared import sampler
from bacinfer.report.table import METHOD_HEADER, episodes_text, method_cells

_COLUMNS = {  # what is a column of the table where its rows differ in it
    "task": "task",
    "checkpoint": "checkpoint",
    "training_seed": "training seed",
    "checkpoint_type": "checkpoint type",
    "num_inference_steps": "K",
    "mean_updates": "updates a block",
    "first_episode_seed": "first episode seed",
    "n_test": "episodes",
    "noise_seed": "noise seed",
    "n_envs": "environments",
    "disturb": "disturbed",
    "engine": "engine",
    "precision": "precision",
    "device": "device",
    "hardware": "hardware",
    "threads": "threads",
}
_OTHER_SAMPLERS = {kind: f" with {name}" for kind, name in SAMPLER_NAMES.items() if kind != "own"}
_SORTED_BY = dict(
    zip(
        METHOD_HEADER,
        (
            *("label", "score", "score_difference", "action_error", "flops", "latency_p50"),
            *("actions_per_second", "speedup", "denoising_p50", "peak_memory", "policy_seconds"),
        ),
        strict=True,
    )
)
_INTERVALS = {"score ± s.e.": "score", "action error": "action_error"}


@dataclass(frozen=True)
class Cell:
    """A cell of the table: its text, an interval below it, and the number that it is sorted by if it has one."""

    text: str
    interval: str = ""
    number: float | None = None


@dataclass(frozen=True)
class RunTable:
    header: list[str]
    rows: list[list[Cell]]


def run_table(rows: Sequence[Row]) -> RunTable:
    """The columns of `METHOD_HEADER`, after the method with one for each setting in which the rows differ."""
    varying = {name: title for name, title in _COLUMNS.items() if len(_values(rows, name)) > 1}
    header = [METHOD_HEADER[0], *varying.values(), *METHOD_HEADER[1:]]
    lines = []
    for row in rows:
        method, *measured = (
            _measured(row, title, text) for title, text in zip(METHOD_HEADER, method_cells(row), strict=True)
        )
        lines.append([method, *(_setting(getattr(row, name)) for name in varying), *measured])
    return RunTable(header, lines)


def facts(rows: Sequence[Row]) -> dict[str, str]:
    """What was evaluated, on what, and when."""
    episodes = _each(rows, lambda row: f"{episodes_text(row)}, noise seed {row.noise_seed}")
    machines = _each(rows, lambda row: f"{row.hardware} ({row.device}), {row.threads} threads, torch {row.torch}")
    calls = _each(rows, lambda row: str(row.latency_calls))
    finished = sorted(f"{row.finished[:16].replace('T', ' ')} UTC" for row in rows)
    return {
        "Checkpoint": _each(rows, lambda row: f"{row.checkpoint} (sha256 {row.checkpoint_sha256[:12]})"),
        "Denoising steps": _each(
            rows, lambda row: f"K = {row.num_inference_steps}{_OTHER_SAMPLERS.get(sampler(row).partition(':')[0], '')}"
        ),
        "Episodes": episodes,
        "Machine": machines,
        "Latency": f"{calls} calls at batch 1",
        "Engine": ", ".join(_values(rows, "engine")) or "none",
        "Evaluated": finished[0] if finished[0] == finished[-1] else f"{finished[0]} to {finished[-1]}",
    }


def _values(rows: Iterable[Row], name: str) -> list[str]:
    """The different values of a setting; of the engine those of cached policies alone, as others have none."""
    values = dict.fromkeys(getattr(row, name) for row in rows)
    if name == "engine":
        values.pop(None, None)
    return [str(value) for value in values]


def _each(rows: Iterable[Row], text: Callable[[Row], str]) -> str:
    found = list(dict.fromkeys(map(text, rows)))
    return "; ".join(found[:4]) + (f"; and {len(found) - 4} more" if len(found) > 4 else "")


def _measured(row: Row, title: str, text: str) -> Cell:
    value = getattr(row, _SORTED_BY[title])
    number = float(value) if isinstance(value, (int, float)) else None
    low = getattr(row, f"{_INTERVALS[title]}_low") if title in _INTERVALS else None
    if low is not None:
        high = getattr(row, f"{_INTERVALS[title]}_high")
        return Cell(text, f"[{low:.3f}, {high:.3f}]", number)
    text, bracket, interval = text.partition(" [")
    return Cell(text, bracket.strip() + interval, number)


def _setting(value: Any) -> Cell:
    if not isinstance(value, (int, float)):
        return Cell("–" if value is None else value)
    return Cell(f"{value:.1f}" if isinstance(value, float) else str(value), number=float(value))
