"""What a report shows: the rows of a results table, and what lies beside it, as plain data for the page.

What is missing or damaged beside the table becomes a note in its place.
"""

from __future__ import annotations

import math
import re
from base64 import b64encode
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from os.path import commonprefix
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bacinfer.analysis.plots import plot_block_errors, plot_schedules, plot_similarities
from bacinfer.analysis.recorded import read_matrices
from bacinfer.analysis.similarity import Array
from bacinfer.assets import RunAssets, read_block_errors
from bacinfer.core.bubbling import split_block_key
from bacinfer.core.cache_request import DEFAULT_METRIC
from bacinfer.core.optimal_steps import stored_selection
from bacinfer.core.schedule import CacheSchedule
from bacinfer.experiments.results_table import Row
from bacinfer.experiments.run_files import SCHEDULE_FILE
from bacinfer.report.pareto import plot_pareto
from bacinfer.report.table import METHOD_HEADER, method_cells, notes
from bacinfer.report.video import film

MAX_FILM_BYTES = 16_000_000
"""Of all videos of one comparison together."""
MAX_DRAWN_SCHEDULES = 6
"""How many schedules stand side by side in a picture for a paper."""

_COMPARABLE = ("checkpoint_sha256", "first_seed", "n_test", "noise_seed", "n_envs", "device")
_COLUMNS = {  # what is a column of the table where its rows differ in it
    "task": "task",
    "checkpoint": "checkpoint",
    "training_seed": "training seed",
    "checkpoint_type": "checkpoint type",
    "num_inference_steps": "K",
    "mean_updates": "updates a block",
    "first_seed": "first seed",
    "n_test": "episodes",
    "noise_seed": "noise seed",
    "n_envs": "environments",
    "engine": "engine",
    "device": "device",
    "hardware": "hardware",
    "threads": "threads",
}
_SORTED_BY = dict(
    zip(
        METHOD_HEADER,
        (
            *("label", "score", "score_difference", "action_error", "flops", "latency_p50"),
            *("actions_per_second", "speedup", "peak_memory", "policy_seconds"),
        ),
        strict=True,
    )
)
_INTERVALS = {"score ± s.e.": "score", "action error": "action_error"}

T = TypeVar("T")
Key = TypeVar("Key", bound=Hashable)


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


@dataclass(frozen=True)
class Picture:
    """An SVG, and the files that it is in."""

    title: str
    svg: str
    files: list[Path]


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


@dataclass(frozen=True)
class Film:
    caption: str
    uri: str


@dataclass
class Comparison:
    """Methods on the same episodes of one checkpoint."""

    title: str
    pareto: Picture | None = None
    films: list[Film] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Analysis:
    """What schedules were found from: similarities and errors of the blocks."""

    directory: str
    pictures: list[Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Section:
    """All about one checkpoint."""

    title: str
    anchor: str
    facts: dict[str, str]
    comparisons: list[Comparison]
    schedules: list[ScheduleMap] = field(default_factory=list)
    schedules_picture: Picture | None = None
    analyses: list[Analysis] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


# -- the table ---------------------------------------------------------------------------------------------------


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
    episodes = _each(rows, lambda row: f"{row.n_test} from seed {row.first_seed}, noise seed {row.noise_seed}")
    machines = _each(rows, lambda row: f"{row.hardware} ({row.device}), {row.threads} threads, torch {row.torch}")
    calls = _each(rows, lambda row: str(row.latency_calls))
    finished = sorted(f"{row.finished[:16].replace('T', ' ')} UTC" for row in rows)
    return {
        "Checkpoint": _each(rows, lambda row: f"{row.checkpoint} (sha256 {row.checkpoint_sha256[:12]})"),
        "Denoising steps": _each(
            rows, lambda row: f"K = {row.num_inference_steps}{' with DDIM' * bool(_sampler(row))}"
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


def _each(rows: Iterable[Row], text: Callable[[Row], str], limit: int = 4) -> str:
    found = list(dict.fromkeys(map(text, rows)))
    more = f"; and {len(found) - limit} more" if len(found) > limit else ""
    return "; ".join(found[:limit]) + more


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


# -- the sections ------------------------------------------------------------------------------------------------


def comparisons(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows that can be compared with each other: of one checkpoint, on the same episodes, on one kind of device."""
    return list(_grouped(rows, lambda row: tuple(getattr(row, name) for name in _COMPARABLE)).values())


def sections(groups: Sequence[Sequence[Row]], results_dir: Path, figures: Path) -> Iterator[Section]:
    """One section a checkpoint, with all of its comparisons; draws their pictures into `figures`.

    Args:
        groups: From `comparisons`.
    """
    for sha256, own in _grouped(groups, lambda group: group[0].checkpoint_sha256).items():
        rows = [row for group in own for row in group]
        first = rows[0]
        name = _slug(f"{first.task}-{sha256[:8]}")
        directory = figures / name
        section = Section(
            f"{first.task}: {Path(first.checkpoint).name}",
            name,
            facts(rows),
            [_comparison(group, results_dir, directory) for group in own],
        )
        _add_schedules(section, rows, results_dir, directory)
        _add_analyses(section, rows, results_dir, directory)
        yield section


def _comparison(rows: Sequence[Row], results_dir: Path, figures: Path) -> Comparison:
    first = rows[0]
    title = f"{first.n_test} episodes from seed {first.first_seed}, noise seed {first.noise_seed}, {first.device}"
    title += "" if first.n_envs is None else f", {first.n_envs} environments at once"
    comparison = Comparison(title, notes=list(notes(rows)))
    if len(rows) > 1:
        path = figures / _slug(f"pareto-{title}")
        comparison.pareto = _picture("Score and action error against cost", plot_pareto(rows, path))
    else:
        comparison.notes.append("One method alone has no Pareto picture; bacinfer compare evaluates several.")
    _add_films(comparison, rows, results_dir)
    return comparison


def _add_films(comparison: Comparison, rows: Sequence[Row], results_dir: Path) -> None:
    size = not_filmed = 0
    for row in rows:
        try:
            caption, path = film(results_dir, row)
            video = path.read_bytes()
        except FileNotFoundError:
            not_filmed += 1
            continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # of the scores' file
            comparison.notes.append(f"The video of {row.label} cannot be shown: {error!r}")
            continue
        size += len(video)
        if size > MAX_FILM_BYTES:
            comparison.notes.append(f"Further videos would make the page too large, such as {path}.")
            break
        comparison.films.append(Film(caption, f"data:video/mp4;base64,{b64encode(video).decode()}"))
    if comparison.films and not_filmed:
        comparison.notes.append(f"{not_filmed} of the {len(rows)} methods were not filmed.")
    if not comparison.films:
        comparison.notes.append(
            f"No episode was filmed; bacinfer compare --film films the first, seed {rows[0].first_seed}."
        )


# -- schedules ---------------------------------------------------------------------------------------------------


def _add_schedules(section: Section, rows: Sequence[Row], results_dir: Path, figures: Path) -> None:
    """Each schedule once, whatever episodes it was evaluated on."""
    done: set[tuple[str, CacheSchedule]] = set()
    drawn: list[CacheSchedule] = []
    matrices = _Matrices(rows, results_dir)
    for row in rows:
        if row.engine is None:  # nothing was cached
            continue
        schedule = _read(section.notes, _read_schedule, results_dir / row.directory / SCHEDULE_FILE)
        if schedule is None or (row.label, schedule) in done:
            continue
        done.add((row.label, schedule))
        selected = _selected(row, results_dir, section.notes)
        similarity, found = matrices.of(row)
        drawing = _read(section.notes, schedule_map, row.label, schedule, selected, similarity, found)
        if drawing is None:
            continue
        section.schedules.append(drawing)
        if row.metric is not None and len(drawn) < MAX_DRAWN_SCHEDULES:
            drawn.append(schedule)
    section.notes += matrices.notes
    section.schedules.sort(key=lambda map: len({tuple(steps) for steps in map.data["steps"]}) == 1)  # block-wise first
    same_blocks = [schedule for schedule in drawn if list(schedule.update_steps) == list(drawn[0].update_steps)]
    if same_blocks:
        files = [figures / "schedules.png", figures / "schedules.svg"]
        plot_schedules(same_blocks, *files)
        section.schedules_picture = _picture("Schedules", files)


def _read_schedule(path: Path) -> CacheSchedule:
    try:
        schedule = CacheSchedule.from_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not schedule.update_steps:
        raise ValueError(f"{path} lists no blocks")
    return schedule


def _selected(row: Row, results_dir: Path, found_missing: list[str]) -> Mapping[str, float]:
    if not row.num_bu_blocks or row.assets is None:
        return {}
    return _read(found_missing, stored_selection, assets_of(row, results_dir), row.num_bu_blocks) or {}


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
        self._read: dict[tuple[Path, str], dict[str, Array] | None] = {}
        for row in rows:
            if row.assets is not None:
                self._by_sampler.setdefault(_sampler(row), row)

    def of(self, row: Row) -> tuple[str, dict[str, Array] | None]:
        """The metric, empty without matrices, and the matrices by block."""
        source = row if row.assets is not None else self._by_sampler.get(_sampler(row))
        if source is None:
            return "", None
        run, metric = assets_of(source, self._results_dir), source.metric or DEFAULT_METRIC
        key = (run.directory, metric)
        if key not in self._read:
            self._read[key] = _read(self.notes, read_matrices, run, metric)
        return (metric if self._read[key] else ""), self._read[key]


def _sampler(row: Row) -> str:
    """``ddim:16``, or nothing for the policy's own."""
    match = re.match(r"ddim:\d+", row.method)
    return match[0] if match else ""


# -- analyses ----------------------------------------------------------------------------------------------------


def _add_analyses(section: Section, rows: Sequence[Row], results_dir: Path, figures: Path) -> None:
    analysed = [row for row in rows if row.assets is not None]
    by_assets = _grouped(analysed, lambda row: assets_of(row, results_dir).directory)
    if not by_assets:
        section.notes.append("No method here has a schedule that was found from similarities between denoising steps.")
    for number, (directory, users) in enumerate(by_assets.items()):
        section.analyses.append(
            _analysis(RunAssets(directory), users, figures / _slug(f"analysis-{number}-{directory.name}"))
        )


def _analysis(run: RunAssets, rows: Sequence[Row], figures: Path) -> Analysis:
    analysis = Analysis(str(run.directory))
    if not run.directory.is_dir():
        analysis.notes.append(f"The assets directory is no longer there: {run.directory}")
        return analysis
    for metric in dict.fromkeys(row.metric or DEFAULT_METRIC for row in rows):
        matrices = _read(analysis.notes, read_matrices, run, metric)
        if matrices:
            files = [figures / f"similarity_{metric}.png", figures / f"similarity_{metric}.svg"]
            plot_similarities(matrices, metric, *files)
            analysis.pictures.append(_picture(f"Similarity of the blocks' residuals: {metric}", files))
    errors = _read(analysis.notes, read_block_errors, run)
    if errors:
        num_blocks = max(row.num_bu_blocks or 0 for row in rows)
        selected = _read(analysis.notes, stored_selection, run, num_blocks) if num_blocks else None
        files = [figures / "block_errors.png", figures / "block_errors.svg"]
        plot_block_errors(errors, selected or (), *files)
        analysis.pictures.append(_picture("Errors of the blocks", files))
    return analysis


# -- shared ------------------------------------------------------------------------------------------------------


def assets_of(row: Row, results_dir: Path) -> RunAssets:
    """The assets directory of a row, which is relative to the results where it lies in there."""
    inside = results_dir / (row.assets or "")
    return RunAssets(inside if inside.is_dir() else Path(row.assets or ""))


def _read(missing: list[str], read: Callable[..., T], *args: Any) -> T | None:
    """What `read` returns; None, and a note in `missing`, if that is missing or damaged."""
    try:
        return read(*args)
    except (OSError, ValueError) as error:
        if str(error) not in missing:
            missing.append(str(error))
        return None


def _grouped(items: Iterable[T], key: Callable[[T], Key]) -> dict[Key, list[T]]:
    """In the order in which the keys appear."""
    groups: dict[Key, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _picture(title: str, files: list[Path]) -> Picture:
    (svg,) = (path for path in files if path.suffix == ".svg")
    text = svg.read_text()
    return Picture(title, text[text.index("<svg") :], files)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-")
