"""Tasks: environments that give observations and score policies, and the table of the benchmark's tasks."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from bacinfer.policies.diffusion_policy import INSTALL_HINT
from bacinfer.tasks.base import Rollout, Task
from bacinfer.tasks.disturbances import check_disturbable
from bacinfer.tasks.metaworld import MAX_STEPS as ARM_MAX_STEPS
from bacinfer.tasks.metaworld import MetaWorldTask
from bacinfer.tasks.pusht import IMAGE_SIZE, MAX_STEPS, PushTImageTask, PushTTask
from bacinfer.tasks.runner import RunnerTask, runner_class
from bacinfer.tasks.simulated import SimulatedTask
from bacinfer.tasks.table import TASKS, TaskInfo

__all__ = [
    "TASKS",
    "MetaWorldTask",
    "PushTImageTask",
    "PushTTask",
    "Rollout",
    "RunnerTask",
    "SimulatedTask",
    "Task",
    "TaskInfo",
    "check_disturbable",
    "make_simulated_task",
    "make_task",
    "task_name",
]

_PUSHT_SETTINGS = {
    "n_latency_steps": 0,
    "legacy_test": True,
    "keypoint_visible_rate": 1.0,
    "agent_keypoints": False,
    "render_size": IMAGE_SIZE,
}
_PUSHT = {"PushTKeypointsRunner": PushTTask, "PushTImageRunner": PushTImageTask}
_ARM = "bacinfer.tasks.metaworld.MetaWorldTask"


def make_task(cfg: DictConfig, *, trust_checkpoint: bool = False) -> Task:
    """The task that the configuration of a checkpoint (as `read_checkpoint` gives it) describes.

    That is the checkpoint's own environment runner of the ``diffusion_policy`` package, or this project's robot arm;
    Push-T, low-dimensional and image, also runs without that package, on gym-pusht.

    Raises:
        ValueError: no runner in the configuration, or one that is not defined in ``diffusion_policy``.
        RuntimeError: the runner's simulator is not installed.
    """
    target, arguments = _runner(cfg)
    if target == _ARM:
        return make_simulated_task(cfg)
    try:
        return RunnerTask(task_name(cfg), runner_class(target, trust_checkpoint=trust_checkpoint), arguments)
    except ImportError as error:
        if _class_name(target) in _PUSHT:
            return make_simulated_task(cfg)
        raise RuntimeError(
            f"task {task_name(cfg)} needs {target}, which cannot be imported ({error}). {INSTALL_HINT}"
        ) from error


def make_simulated_task(cfg: DictConfig) -> SimulatedTask:
    """The task of a checkpoint's configuration, simulated by this project itself.

    Raises:
        ValueError: this project does not simulate it.
    """
    target, arguments = _runner(cfg)
    if target == _ARM:
        max_steps = int(arguments.get("max_steps") or ARM_MAX_STEPS)
        return MetaWorldTask(task_name(cfg), arguments["env_name"], int(cfg.n_obs_steps), max_steps)
    if (name := _class_name(target)) in _PUSHT:
        _check_pusht(arguments)
        return _PUSHT[name](int(cfg.n_obs_steps), int(arguments.get("max_steps") or MAX_STEPS))
    raise ValueError(
        f"task {task_name(cfg)} runs in {target} alone: only Push-T and the robot arm of Meta-World are simulated here"
    )


def _runner(cfg: DictConfig) -> tuple[str, dict[str, Any]]:
    """The class of a checkpoint's environment runner, and the arguments for it."""
    target = OmegaConf.select(cfg, "task.env_runner._target_")
    if target is None:
        raise ValueError("the checkpoint's configuration names no environment: task.env_runner._target_ is missing")
    arguments: Any = OmegaConf.to_container(cfg.task.env_runner, resolve=True)
    del arguments["_target_"]
    return target, arguments


def task_name(cfg: DictConfig) -> str:
    """The task table's name for the task of a configuration, or the task's own if the table has none."""
    dataset_type = OmegaConf.select(cfg, "task.dataset_type")
    if dataset_type is not None:  # robomimic
        return f"{cfg.task.task_name}_{dataset_type}"
    name = str(cfg.task.name)
    prefixes = {"pusht_lowdim": "pusht", "blockpush": "block_pushing", "kitchen": "kitchen"}
    return next((task for prefix, task in prefixes.items() if name.startswith(prefix)), name)


def _class_name(target: str) -> str:
    return target.rpartition(".")[2]


def _check_pusht(arguments: dict[str, Any]) -> None:
    """Raises ValueError for a runner's settings that are not simulated here."""
    found = {key: arguments[key] for key in _PUSHT_SETTINGS if arguments.get(key) is not None}
    expected = {key: _PUSHT_SETTINGS[key] for key in found}
    if found != expected:
        raise ValueError(f"Push-T without diffusion_policy supports {expected}, but the checkpoint has {found}")
