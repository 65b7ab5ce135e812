"""Schedules as maps of blocks and denoising steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from os.path import commonprefix
from pathlib import Path
from typing import Any

import numpy as np

from bacinfer.analysis.plots import plot_schedules
from bacinfer.analysis.recorded import read_matrices
from bacinfer.analysis.similarity import Array
from bacinfer.core.bubbling import split_block_key
from bacinfer.core.cache_request import DEFAULT_METRIC
from bacinfer.core.optimal_steps import stored_selection
from bacinfer.core.plan import SamplingPlan
from bacinfer.core.schedule import CacheSchedule
from bacinfer.experiments.run_files import PLAN_FILE
from bacinfer.experiments.store import Row
from bacinfer.report.sections.shared import Picture, assets_of, drawn, read_or_note, sampler

MAX_DRAWN_SCHEDULES = 6
"""How many schedules stand side by side in a picture for a paper."""


@dataclass(frozen=True)
class MapRow:
    """A block in a `ScheduleMap`; `selected` is whether bubbling union extends it."""

    block: str
    label: str
    num_updates: int
    is_banded: bool
    selected: bool


@dataclass(frozen=True)
class ScheduleMap:
    """A schedule as block × denoising step.

    Attributes:
        prefix: what the labels of the rows leave out of the block keys.
        updates: an SVG path, one unit a block and a step.
        similarity: which one `data` has; empty without.
        data: for hovering: ``blocks``, the update ``steps`` of each, and at each step the ``similarities`` to the step
            whose residual is reused, None at updates.
    """

    method: str
    mean_updates: float
    num_steps: int
    prefix: str
    rows: list[MapRow]
    updates: str
    similarity: str
    data: dict[str, Any]


@dataclass
class Schedules:
    """The schedules of a checkpoint's methods, and those of them that stand in a picture for papers."""

    maps: list[ScheduleMap] = field(default_factory=list)
    picture: Picture | None = None
    notes: list[str] = field(default_factory=list)


def schedules(rows: Sequence[Row], results_dir: Path, figures: Path) -> Schedules:
    """Each schedule once, whatever episodes it was evaluated on."""
    found = Schedules()
    done: set[tuple[str, CacheSchedule]] = set()
    to_draw: list[CacheSchedule] = []
    matrices = _Matrices(rows, results_dir)
    for row in rows:
        if row.engine is None:  # nothing was cached
            continue
        schedule = read_or_note(found.notes, _read_schedule, results_dir / row.directory / PLAN_FILE)
        if schedule is None or (row.label, schedule) in done:
            continue
        done.add((row.label, schedule))
        selected = _selected(row, results_dir, found.notes)
        drawing = read_or_note(found.notes, schedule_map, row.label, schedule, selected, *matrices.of(row))
        if drawing is None:
            continue
        found.maps.append(drawing)
        if row.metric is not None and len(to_draw) < MAX_DRAWN_SCHEDULES:
            to_draw.append(schedule)
    found.notes += matrices.notes
    found.maps.sort(key=lambda map: len({tuple(steps) for steps in map.data["steps"]}) == 1)  # block-wise first
    same_blocks = [schedule for schedule in to_draw if list(schedule.update_steps) == list(to_draw[0].update_steps)]
    if same_blocks:
        found.picture = drawn("Schedules", figures / "schedules", plot_schedules, same_blocks)
    return found


def _read_schedule(path: Path) -> CacheSchedule | None:
    """None where every block is computed at every step."""
    schedule = SamplingPlan.load(path).cache
    if schedule is not None and not schedule.update_steps:
        raise ValueError(f"{path} lists no blocks")
    return schedule


def _selected(row: Row, results_dir: Path, found_missing: list[str]) -> Mapping[str, float]:
    if not row.num_bu_blocks or row.assets is None:
        return {}
    return read_or_note(found_missing, stored_selection, assets_of(row, results_dir), row.num_bu_blocks) or {}


def schedule_map(
    method: str,
    schedule: CacheSchedule,
    selected: Iterable[str] = (),
    similarity: str = "",
    matrices: Mapping[str, Array] | None = None,
) -> ScheduleMap:
    """A schedule as a map; hovering tells similarities where `matrices` (block key to [K, K]) has them.

    Raises:
        ValueError: a block key has no layer.
    """
    blocks = list(schedule.update_steps)
    prefix = commonprefix(blocks)  # noqa: RUF071 (of characters, these are no paths)
    prefix = prefix[: prefix.rfind(".") + 1]
    layers = list(dict.fromkeys(split_block_key(block)[0] for block in blocks))
    rows = [
        MapRow(
            block,
            block.removeprefix(prefix).replace("_", " ", 1),
            schedule.num_updates(block),
            layers.index(split_block_key(block)[0]) % 2 == 1,
            block in set(selected),
        )
        for block in blocks
    ]
    data = {
        "blocks": blocks,
        "steps": [list(schedule.update_steps[block]) for block in blocks],
        "metric": similarity,
        "similarities": [_reuse_similarities(schedule, block, matrices or {}) for block in blocks],
    }
    updates = "".join(
        f"M{start} {n}h{length}v1h-{length}z"
        for n, block in enumerate(blocks)
        for start, length in _runs(schedule, block)
    )
    mean = sum(row.num_updates for row in rows) / max(1, len(rows))
    return ScheduleMap(method, mean, schedule.num_inference_steps, prefix, rows, updates, similarity, data)


def _runs(schedule: CacheSchedule, block: str) -> Iterator[tuple[int, int]]:
    """Start and length of each run of consecutive update steps."""
    steps = schedule.update_steps[block]
    for _, run in groupby(enumerate(steps), lambda pair: pair[1] - pair[0]):
        members = [step for _, step in run]
        yield members[0], len(members)


def _reuse_similarities(
    schedule: CacheSchedule, block: str, matrices: Mapping[str, Array]
) -> list[float | None] | None:
    """At each step the similarity to the step whose residual is reused; None without matrices of this K."""
    num_steps = schedule.num_inference_steps
    if block not in matrices or matrices[block].shape != (num_steps, num_steps):
        return None
    steps = np.arange(num_steps)
    updated = np.array(schedule.update_mask(block))
    source = np.maximum.accumulate(np.where(updated, steps, 0))
    values = matrices[block][source, steps].tolist()
    return [
        None if update or not math.isfinite(value) else float(f"{value:.4g}")
        for update, value in zip(updated, values, strict=True)
    ]


class _Matrices:
    """The similarity matrices that belong to the schedules of a checkpoint, each read once.

    A schedule that was not found from similarities, such as a uniform one, is shown with those of the same sampler.
    """

    def __init__(self, rows: Iterable[Row], results_dir: Path) -> None:
        self.notes: list[str] = []
        self._results_dir = results_dir
        self._by_sampler: dict[str, Row] = {}
        self._found: dict[tuple[Path, str], dict[str, Array] | None] = {}
        for row in rows:
            if row.assets is not None:
                self._by_sampler.setdefault(sampler(row), row)

    def of(self, row: Row) -> tuple[str, dict[str, Array] | None]:
        """The metric, empty without matrices, and the matrices by block."""
        source = row if row.assets is not None else self._by_sampler.get(sampler(row))
        if source is None:
            return "", None
        run, metric = assets_of(source, self._results_dir), source.metric or DEFAULT_METRIC
        key = (run.directory, metric)
        if key not in self._found:
            self._found[key] = read_or_note(self.notes, read_matrices, run, metric)
        return (metric if self._found[key] else ""), self._found[key]
