"""All about one checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bacinfer.experiments.store import Row
from bacinfer.report.sections.analyses import Analysis, analyses
from bacinfer.report.sections.comparisons import MethodComparison, compare
from bacinfer.report.sections.runs import facts
from bacinfer.report.sections.schedules import Schedules, schedules
from bacinfer.report.sections.shared import grouped, slug


@dataclass(frozen=True)
class Section:
    """All about one checkpoint."""

    title: str
    anchor: str
    facts: dict[str, str]
    comparisons: list[MethodComparison]
    schedules: Schedules
    analyses: list[Analysis]


def sections(groups: Sequence[Sequence[Row]], results_dir: Path, figures: Path) -> Iterator[Section]:
    """One section a checkpoint, with all of its comparisons; draws their pictures into `figures`.

    Args:
        groups: From `comparisons`.
    """
    for sha256, own in grouped(groups, lambda group: group[0].checkpoint_sha256).items():
        rows = [row for group in own for row in group]
        first = rows[0]
        name = slug(f"{first.task}-{sha256[:8]}")
        directory = figures / name
        yield Section(
            f"{first.task}: {Path(first.checkpoint).name}",
            name,
            facts(rows),
            [compare(group, results_dir, directory) for group in own],
            schedules(rows, results_dir, directory),
            analyses(rows, results_dir, directory),
        )
