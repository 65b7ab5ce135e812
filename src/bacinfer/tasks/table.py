"""The tasks that policies are evaluated on, as data: Diffusion Policy's benchmark, and a robot arm of this project."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class TaskInfo:
    """A task's name, its group, and which entries of the runner's log are its results.

    `metrics` are keys below ``test/``; each is a row of its own in result tables. `smoke_test` says, of a task on which
    next to nothing fails and which therefore tells no method from another, what already solves it.
    """

    name: str
    group: str
    metrics: tuple[str, ...] = ("mean_score",)
    smoke_test: str | None = None

    @property
    def described(self) -> str:
        """Its name, and what kind of task it is where that has to be known."""
        return f"{self.name} (a smoke test)" if self.smoke_test else self.name

    def row_name(self, metric: str) -> str:
        """The name of a metric's row: the task's own, or e.g. ``kitchen_p_1`` where it has several."""
        return self.name if len(self.metrics) == 1 else f"{self.name}_{metric}"


GROUPS = ("ph", "mh", "lowdim", "arm", "image")

TASKS: dict[str, TaskInfo] = {
    info.name: info
    for info in (
        TaskInfo("lift_ph", "ph"),
        TaskInfo("can_ph", "ph"),
        TaskInfo("square_ph", "ph"),
        TaskInfo("pusht", "ph"),
        TaskInfo("transport_ph", "ph"),
        TaskInfo("tool_hang_ph", "ph"),
        TaskInfo("lift_mh", "mh"),
        TaskInfo("can_mh", "mh"),
        TaskInfo("square_mh", "mh"),
        TaskInfo("transport_mh", "mh"),
        TaskInfo("block_pushing", "lowdim", ("p1", "p2"), "two steps of the shipped policy solve it 96 times of 100"),
        TaskInfo("kitchen", "lowdim", ("p_1", "p_2", "p_3", "p_4")),
        TaskInfo("assembly", "arm"),
        TaskInfo("drawer_open", "arm", smoke_test="two denoising steps solve it 50 times of 50"),
        TaskInfo("pick_place", "arm", smoke_test="one denoising step solves it 100 times of 100"),
        TaskInfo("pusht_image", "image"),
    )
}


def tasks_named(names: Iterable[str]) -> list[TaskInfo]:
    """The table's rows of the given names.

    Raises:
        ValueError: a name that is not in the table.
    """
    names = list(names)
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise ValueError(f"unknown task {', '.join(unknown)}: expected some of {', '.join(TASKS)}")
    return [TASKS[name] for name in names]


def tasks_in_group(group: str) -> list[TaskInfo]:
    """The table's rows of ``ph``, ``mh``, ``lowdim``, ``arm`` or ``image``."""
    if group not in GROUPS:
        raise ValueError(f"unknown task group {group}: expected one of {', '.join(GROUPS)}")
    return [info for info in TASKS.values() if info.group == group]
