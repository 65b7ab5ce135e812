"""Methods on the same episodes: cost against quality, and their films."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bacinfer.experiments.store import Row
from bacinfer.report.pareto import plot_pareto
from bacinfer.report.sections.shared import Picture, drawn, grouped, slug
from bacinfer.report.table import episodes_text, notes
from bacinfer.report.video import film

MAX_FILM_BYTES = 16_000_000
"""Of all videos of one comparison together."""
_COMPARABLE = ("checkpoint_sha256", "first_episode_seed", "n_test", "noise_seed", "n_envs", "disturb", "device")


@dataclass(frozen=True)
class Film:
    caption: str
    uri: str


@dataclass
class MethodComparison:
    """Methods on the same episodes of one checkpoint."""

    title: str
    pareto: Picture | None = None
    films: list[Film] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def comparisons(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows that can be compared with each other: of one checkpoint, on the same episodes, on one kind of device."""
    return list(grouped(rows, lambda row: tuple(getattr(row, name) for name in _COMPARABLE)).values())


def compare(rows: Sequence[Row], results_dir: Path, figures: Path) -> MethodComparison:
    first = rows[0]
    title = f"{episodes_text(first)}, noise seed {first.noise_seed}, {first.device}"
    title += "" if first.n_envs is None else f", {first.n_envs} environments at once"
    comparison = MethodComparison(title, notes=list(notes(rows)))
    if len(rows) > 1:
        path = figures / slug(f"pareto-{title}")
        comparison.pareto = drawn("Score and action error against cost", path, plot_pareto, rows)
    else:
        comparison.notes.append("One method alone has no Pareto picture; bacinfer compare evaluates several.")
    _add_films(comparison, rows, results_dir)
    return comparison


def _add_films(comparison: MethodComparison, rows: Sequence[Row], results_dir: Path) -> None:
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
            f"No episode was filmed; bacinfer compare --film films the first, seed {rows[0].first_episode_seed}."
        )
