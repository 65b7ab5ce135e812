"""Experiment → run → row: the one way in which every command evaluates a method and keeps its result."""

from __future__ import annotations

import hashlib
import json
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from bacinfer.analysis.residuals import file_digest
from bacinfer.assets import RunAssets
from bacinfer.core.engines import AUTO, check_is_precision
from bacinfer.experiments.evaluation import calibration_observations, evaluate
from bacinfer.experiments.method import PLAIN, Method
from bacinfer.experiments.plans import make_plan
from bacinfer.experiments.run_files import (
    PlainResult,
    make_row,
    read_plain_result,
    write_plain_result,
    write_results,
)
from bacinfer.experiments.schedules import ScheduleAssets
from bacinfer.experiments.store import ROW_FILE, ResultsStore, Row, run_directory
from bacinfer.experiments.subjects import load_subject
from bacinfer.files import check_path, write_json
from bacinfer.lerobot.installation import WEIGHTS as LEROBOT_WEIGHTS
from bacinfer.measurement.action_error import normalised_actions, rms_difference
from bacinfer.policies.device import check_device
from bacinfer.tasks import Task, check_disturbable

DEFAULT_FIRST_EPISODE_SEED = 100_000
DEFAULT_EPISODES = 50
DEFAULT_LATENCY_CALLS = 20


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One method on one checkpoint.

    Attributes:
        first_episode_seed, n_test: the episodes' seeds count up from the first one.
        noise_seed: of the sampling noise.
        n_envs: how many environments run at once; None for the task's own number.
        disturb: whether each episode is disturbed once, as its seed determines (see `tasks.disturbances`).
        latency_calls: how many calls are timed.
        engine: what runs the schedule.
        precision: of its products; None for the policy's own (see `bacinfer.apply`).
        env: of a checkpoint of LeRobot's, which is a directory: the environment, as `lerobot.environment` spells it.
        assets_dir: ``assets/<task>/original``, for schedules that it holds; others are found from the policy.
        optimal_steps_dir: update steps to use, and no others.
        training_seed, checkpoint_type: which checkpoint of a task this is, where it was found by those.
        trust_checkpoint: whether code in the checkpoint may run.

    Raises:
        ValueError: no episodes, no calls to time, a negative seed, no such device, or a path that no table can hold.
    """

    checkpoint: str
    method: Method = PLAIN
    first_episode_seed: int = DEFAULT_FIRST_EPISODE_SEED
    n_test: int = DEFAULT_EPISODES
    noise_seed: int = 0
    n_envs: int | None = None
    disturb: bool = False
    latency_calls: int = DEFAULT_LATENCY_CALLS
    device: str = "cpu"
    engine: str = AUTO
    precision: str | None = None
    env: str | None = None
    assets_dir: str | None = None
    optimal_steps_dir: str | None = None
    training_seed: int | None = None
    checkpoint_type: str | None = None
    trust_checkpoint: bool = False

    def __post_init__(self) -> None:
        for name in ("n_test", "latency_calls", "n_envs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value}: expected at least one")
        for name, seed in (("first_episode_seed", self.first_episode_seed), ("noise_seed", self.noise_seed)):
            if seed < 0:
                raise ValueError(f"--{name} {seed} is negative")
        check_is_precision(self.precision)
        check_device(self.device)
        for path in (self.checkpoint, self.assets_dir, self.optimal_steps_dir):
            if path is not None:
                check_path(path)

    @property
    def checkpoint_sha256(self) -> str:
        path = Path(self.checkpoint, *([] if self.env is None else [LEROBOT_WEIGHTS]))
        if not path.is_file():
            raise FileNotFoundError(f"no checkpoint at {path}")
        return _digest(str(path), path.stat().st_mtime_ns)

    @property
    def configuration(self) -> dict[str, Any]:
        """Everything that determines the result, apart from the machine, as JSON can hold it."""
        return {
            "checkpoint_sha256": self.checkpoint_sha256,
            "training_seed": self.training_seed,
            "checkpoint_type": self.checkpoint_type,
            "method": self.method.spec,
            "schedule": self.schedule_assets(Path()).digest(self.method),
            "engine": None if self.method.as_it_is else self.engine,
            "precision": self._precision,
            "first_episode_seed": self.first_episode_seed,
            "n_test": self.n_test,
            "noise_seed": self.noise_seed,
            "n_envs": self.n_envs,
            "disturb": self.disturb,
            "latency_calls": self.latency_calls,
            "device": torch.device(self.device).type,
            **({} if self.env is None else {"env": self.env}),
        }

    @property
    def label(self) -> str:
        """The method for people, with the precision where it has one."""
        return self.method.label if self._precision is None else f"{self.method.label}, {self._precision}"

    @property
    def _precision(self) -> str | None:
        return None if self.method.as_it_is else self.precision

    @property
    def key(self) -> str:
        """Digest of the configuration: equal where the results are."""
        return hashlib.sha256(json.dumps(self.configuration, sort_keys=True).encode()).hexdigest()[:16]

    def schedule_assets(self, results_dir: Path) -> ScheduleAssets:
        sha256 = self.checkpoint_sha256
        return ScheduleAssets(
            sha256,
            results_dir / "assets" / f"{Path(self.checkpoint).stem}-{sha256[:8]}",
            RunAssets(Path(self.assets_dir)) if self.assets_dir else None,
            Path(self.optimal_steps_dir) if self.optimal_steps_dir else None,
        )


@dataclass(frozen=True)
class Outcome:
    """What became of an experiment: ``evaluated``, ``kept`` (was there already) or ``failed``, which has no row."""

    experiment: Experiment
    status: str
    row: Row | None = None
    detail: str = ""


class PlainRunError(RuntimeError):
    """The plain policy's run failed for a `reason`, and there is nothing to compare another method with."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the plain policy, which it is compared with, failed: {reason}")
        self.reason = reason


def check(experiments: Iterable[Experiment], results_dir: str | Path) -> None:
    """Loads the policies, makes the plans and opens the results: mistakes show before anything slow.

    Raises:
        OSError: the results cannot be written; and what `run` raises.
    """
    for experiment in experiments:
        policy, task, _ = _load(experiment)
        if experiment.disturb:
            check_disturbable(task)
        make_plan(policy, experiment.method, experiment.schedule_assets(Path(results_dir)).schedules(task))
    ResultsStore(results_dir).check()


def run(experiment: Experiment, results_dir: str | Path, *, film: bool = False, force: bool = False) -> Row:
    """The result of an experiment: as it is in the results directory, or evaluated now and added to it.

    The plain policy is evaluated first where it was not, as the others are compared with it. While another process
    works on the same experiment, this waits for its result.

    Args:
        results_dir: Laid out as `store` says.
        film: Whether to film the first episode of what is evaluated now.
        force: Evaluate again what has a result; the new one counts.

    Raises:
        ValueError: the experiment does not fit the policy or the task, or the checkpoint or the results are damaged.
        FileNotFoundError: there is no such checkpoint, or `optimal_steps_dir` lacks the schedule.
        RuntimeError: the simulator is missing or failed; `PlainRunError` if that was in the plain policy's run.
    """
    results_dir = Path(results_dir)
    store, key = ResultsStore(results_dir), experiment.key
    with store.claim(key):
        row = store.find(key)
        if row is not None and not force:
            return row
        check([experiment], results_dir)
        plain = None
        if experiment.method != PLAIN:
            try:
                plain_row = run(replace(experiment, method=PLAIN), results_dir, film=film)
            except Exception as error:
                raise PlainRunError(_text(error)) from error
            plain = read_plain_result(results_dir / plain_row.directory, experiment.device)
        row = _evaluate(experiment, plain, results_dir, film)
        store.write(row)
        return row


def run_all(
    experiments: Sequence[Experiment],
    results_dir: str | Path,
    *,
    film: bool = False,
    force: bool = False,
    debug: bool = False,
) -> list[Outcome]:
    """Runs one experiment after the other, see `Attempts`."""
    attempts = Attempts(results_dir, film=film, force=force, debug=debug)
    outcomes = []
    for number, experiment in enumerate(experiments, start=1):
        print(f"[{number}/{len(experiments)}] {experiment.label} on {experiment.checkpoint}", file=sys.stderr)
        outcomes.append(attempts.run(experiment))
        print(f"  {outcomes[-1].status} {outcomes[-1].detail}".rstrip(), file=sys.stderr, flush=True)
    return outcomes


class Attempts:
    """Runs experiments (see `run`) of which a failure, whatever it is, is an outcome as well: others can go on.

    A plain policy's run that failed is not run again for what would be compared with it.
    """

    def __init__(
        self, results_dir: str | Path, *, film: bool = False, force: bool = False, debug: bool = False
    ) -> None:
        self.results_dir = Path(results_dir)
        ResultsStore(results_dir).check()
        self._film = film
        self._force = force
        self._debug = debug
        self._failed_plain: dict[str, str] = {}  # why, by the plain run's key

    def run(self, experiment: Experiment) -> Outcome:
        try:
            kept = not self._force and ResultsStore(self.results_dir).find(experiment.key) is not None
            row = self._run(experiment)
        except Exception as error:
            if self._debug:
                traceback.print_exc()
            return Outcome(experiment, "failed", detail=_text(error))
        return Outcome(experiment, "kept" if kept else "evaluated", row)

    def _run(self, experiment: Experiment) -> Row:
        plain = replace(experiment, method=PLAIN).key
        if plain in self._failed_plain:
            raise PlainRunError(self._failed_plain[plain])
        try:
            return run(experiment, self.results_dir, film=self._film, force=self._force)
        except PlainRunError as error:
            self._failed_plain[plain] = error.reason
            raise
        except Exception as error:
            if experiment.method == PLAIN:
                self._failed_plain[plain] = _text(error)
            raise


def _evaluate(experiment: Experiment, plain: PlainResult | None, results_dir: Path, film: bool) -> Row:
    """Evaluates, and writes all files of the run but its row; without `plain` it is the plain policy's."""
    policy, task, cfg = _load(experiment)
    method = experiment.method
    assets = experiment.schedule_assets(results_dir)
    directory = results_dir / run_directory(method.spec, experiment.key)

    observations = calibration_observations(policy, task) if plain is None else plain.observations
    result = evaluate(
        policy,
        task,
        range(experiment.first_episode_seed, experiment.first_episode_seed + experiment.n_test),
        observations,
        method,
        make_plan(policy, method, assets.schedules(task)),
        video_dir=directory / "media" if film else None,
        **_named(experiment, "engine", "precision", "latency_calls", "noise_seed", "n_envs", "disturb"),
    )
    (directory / ROW_FILE).unlink(missing_ok=True)  # a row of an earlier run is not that of the files from here on
    if plain is None:
        noise_error = rms_difference(result.actions, normalised_actions(policy, observations, noise_seed=1)).mean
        plain = PlainResult(result, observations, noise_error)
        write_plain_result(directory, plain)
    run_assets = assets.of(method)
    row = make_row(
        result,
        plain,
        key=experiment.key,
        task=task.name,
        method=method.spec,
        assets=None if run_assets is None else _relative(run_assets.directory, results_dir),
        **_named(experiment, "label", "checkpoint", "checkpoint_sha256", "checkpoint_type", "training_seed", "device"),
        **_named(experiment, "first_episode_seed", "n_test", "noise_seed", "n_envs", "disturb"),
        **_named(method, "num_caches", "num_bu_blocks", "metric"),
    )
    write_json(directory / "configuration.json", experiment.configuration)
    write_results(directory, result, plain, row, method, policy, cfg)
    return row


def _named(settings: Experiment | Method, *names: str) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in names}


def _load(experiment: Experiment) -> tuple[Any, Task, DictConfig]:
    """The plain policy, its task and its configuration; the last one loaded is kept."""
    path, sha256 = experiment.checkpoint, experiment.checkpoint_sha256
    return load_subject(path, sha256, experiment.device, experiment.env, experiment.trust_checkpoint)


@lru_cache
def _digest(path: str, modified: int) -> str:
    return file_digest(path)


def _relative(path: Path, directory: Path) -> str:
    return str(path.relative_to(directory)) if path.is_relative_to(directory) else str(path)


def _text(error: Exception) -> str:
    return str(error) or repr(error)
