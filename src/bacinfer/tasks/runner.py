"""Tasks of Diffusion Policy's own environment runners, with the settings that a checkpoint carries.

The package ``diffusion_policy`` and the simulator that the runner needs have to be importable.
"""

from __future__ import annotations

import inspect
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from bacinfer.core.calls import seeded_noise, timed_call
from bacinfer.files import atomic_write
from bacinfer.policies import diffusion_policy
from bacinfer.tasks.base import FIRST_TEST_SEED, Rollout, check_count, check_rollout
from bacinfer.tasks.runner_errors import explain

_PACKAGE = "diffusion_policy."


class RunnerTask:
    """A runner class of ``diffusion_policy`` and the arguments that a checkpoint has for it."""

    def __init__(self, name: str, runner_class: type, arguments: Mapping[str, Any]) -> None:
        self.name = name
        self._runner_class = runner_class
        self._arguments = dict(arguments)

    def observations(self, policy: Any, demo_idx: int, count: int = 1) -> Iterator[dict[str, Tensor]]:
        """See `Task.observations`. (The kitchen's training starts always begin with the first recorded one.)"""
        check_count(count)
        watched = WatchedPolicy(policy, stop_at=count)
        with (
            tempfile.TemporaryDirectory() as output_dir,
            self._runner(output_dir, [demo_idx]) as runner,
            seeded_noise(policy, demo_idx),
            suppress(StopRollout),
        ):
            self._run(runner, watched)
        return iter([{key: value[:1].clone() for key, value in obs.items()} for obs in watched.observations])

    def rollout(
        self,
        policy: Any,
        seeds: Sequence[int],
        *,
        noise_seed: int = 0,
        video_dir: str | Path | None = None,
        video_seeds: Sequence[int] = (),
        n_envs: int | None = None,
    ) -> Rollout:
        """See `Task.rollout`. The runner counts seeds up from the first one and films the first ones.

        Its noise is equal between two policies as long as all seeds fit into one batch of its environments
        (`n_envs`, or else that of the checkpoint); later batches start where the noise of the earlier ones ended.

        Raises:
            ValueError: seeds that are not contiguous, or videos of others than the first ones.
            RuntimeError: the runner does not start, or one of its environments failed.
        """
        check_rollout(seeds, video_dir, video_seeds, n_envs)
        if list(video_seeds) != list(seeds[: len(video_seeds)]):
            raise ValueError(
                f"{self._runner_class.__name__} films the first seeds only, not {list(video_seeds)} of {list(seeds)}"
            )
        watched = WatchedPolicy(policy)
        with (
            tempfile.TemporaryDirectory() as output_dir,
            self._runner(output_dir, seeds, len(video_seeds), n_envs) as runner,
            seeded_noise(policy, noise_seed + seeds[0]),
        ):
            start = time.perf_counter()
            log = {key: _plain(value) for key, value in self._run(runner, watched).items()}
            seconds = time.perf_counter() - start
            videos = _keep_videos(log, Path(video_dir)) if video_dir else {}
        return Rollout(
            log=log,
            policy_seconds=watched.seconds,
            env_seconds=seconds - sum(watched.seconds),
            videos=videos,
        )

    @contextmanager
    def _runner(
        self, output_dir: str, seeds: Sequence[int], num_videos: int = 0, n_envs: int | None = None
    ) -> Iterator[Any]:
        """A runner with the checkpoint's arguments, but of these seeds; its environments are closed at the end."""
        first, count = seeds[0], len(seeds)
        kinds = {"train" if seed < FIRST_TEST_SEED else "test" for seed in seeds}
        if list(seeds) != list(range(first, first + count)) or len(kinds) != 1:
            raise ValueError(
                f"{self._runner_class.__name__} needs contiguous seeds, all below {FIRST_TEST_SEED} or none, "
                f"found {list(seeds)}"
            )
        (kind,) = kinds
        arguments = {
            **self._arguments,
            "n_train": 0,
            "n_train_vis": 0,
            "n_test": 0,
            "n_test_vis": 0,
            f"n_{kind}": count,
            f"n_{kind}_vis": num_videos,
            self._start_name(kind): first,
            "n_envs": min(n_envs or self._arguments.get("n_envs") or count, count),
        }
        try:
            runner = self._runner_class(output_dir=output_dir, **arguments)
        except Exception as error:
            raise RuntimeError(
                f"cannot start {self._runner_class.__name__} of task {self.name}: {explain(error)}"
            ) from error
        try:
            yield runner
        finally:
            with suppress(Exception):  # after a failure closing may fail too, and would hide it
                runner.env.close(terminate=True)

    def _run(self, runner: Any, watched: WatchedPolicy) -> dict[str, Any]:
        """The runner's log. What the policy raises comes out as it is, anything else as a RuntimeError."""
        try:
            return runner.run(watched)
        except Exception as error:
            if isinstance(error, StopRollout) or error is watched.error:
                raise
            raise RuntimeError(f"{self._runner_class.__name__} of task {self.name} failed: {explain(error)}") from error

    def _start_name(self, kind: str) -> str:
        """Training starts are a demonstration's index for robomimic's runner; everything else is a seed."""
        indexed = f"{kind}_start_idx" in inspect.signature(self._runner_class).parameters
        return f"{kind}_start_idx" if indexed else f"{kind}_start_seed"


class StopRollout(Exception):
    """Ends a runner's run once enough observations were seen."""


class WatchedPolicy:
    """Stands in for a policy inside a runner: times every call, stops the run at call `stop_at`, keeps its `error`."""

    def __init__(self, policy: Any, stop_at: int | None = None) -> None:
        self._policy = policy
        self._stop_at = stop_at
        self.observations: list[dict[str, Tensor]] = []
        self.seconds: list[float] = []
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def predict_action(self, obs: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._stop_at is not None:
            self.observations.append(obs)
            if len(self.observations) == self._stop_at:
                raise StopRollout
        try:
            action, seconds = timed_call(self._policy, obs)
        except Exception as error:
            self.error = error
            raise
        self.seconds.append(seconds)
        return action


def runner_class(target: str, *, trust_checkpoint: bool = False) -> type:
    """The class that a checkpoint's ``task.env_runner._target_`` names.

    Raises:
        ValueError: it is no class, or not one of ``diffusion_policy`` and the checkpoint is not trusted.
        ImportError: it cannot be imported.
    """
    if not trust_checkpoint and not target.startswith(_PACKAGE):
        raise ValueError(_foreign(target))
    found = diffusion_policy.find(target)
    if not isinstance(found, type):
        raise ValueError(f"the checkpoint's environment runner {target} is no class")
    if not trust_checkpoint and not found.__module__.startswith(_PACKAGE):
        raise ValueError(_foreign(target))
    return found


def _foreign(target: str) -> str:
    return (
        f"the checkpoint's environment runner is {target}, which diffusion_policy does not define; "
        "pass --trust_checkpoint if you know where the checkpoint comes from"
    )


def _plain(value: Any) -> Any:
    """An entry of a runner's log as JSON can hold it: a number, or the path of a wandb video."""
    return str(value._path) if hasattr(value, "_path") else float(value)


def _keep_videos(log: dict[str, Any], video_dir: Path) -> dict[int, Path]:
    """Copies the runner's videos, whose names are random, to ``{seed}.mp4``, which the log then names; by seed."""
    videos: dict[int, Path] = {}
    for key, found in log.items():
        if "/sim_video_" in key:
            seed = int(key.rpartition("_")[2])
            videos[seed] = video_dir / f"{seed}.mp4"
            with atomic_write(videos[seed]) as temporary:
                shutil.copyfile(found, temporary)
            log[key] = str(videos[seed])
    return videos
