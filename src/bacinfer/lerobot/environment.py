"""LeRobot's environments as tasks: their episodes are run by LeRobot's own rollout."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lerobot.envs.configs import EnvConfig
from lerobot.envs.factory import make_env, make_env_config, make_env_pre_post_processors
from lerobot.scripts import lerobot_eval
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from bacinfer.core.calls import seeded_noise
from bacinfer.core.patching import Patch
from bacinfer.lerobot.checkpoint import load_policy, load_processors
from bacinfer.lerobot.registry import handle
from bacinfer.measurement.latency import Timed
from bacinfer.tasks.base import Rollout, check_count, check_rollout, runner_log
from bacinfer.tasks.video import Frame, open_video

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv
    from lerobot.policies.pretrained import PreTrainedPolicy

    from bacinfer.core.handle import PolicyHandle

_SCORED_BY_REWARD = ("pusht",)
"""Where the highest reward is the score, the share of the target that is covered; elsewhere success is."""


class EnvironmentTask:
    """A LeRobot environment for a checkpoint's policy, as `bacinfer.tasks.Task` describes tasks.

    Args:
        checkpoint: The directory that the policy is from, with its processors.
        policy: The policy.
        environment: Its type and settings, as ``lerobot-eval`` has them after ``--env.``:
            ``pusht,episode_length=100``.

    Raises:
        ValueError: there is no such environment or setting.
    """

    def __init__(self, checkpoint: Path, policy: PreTrainedPolicy, environment: str) -> None:
        self.name = environment
        self.kind, *settings = environment.split(",")
        self.config = _environment_config(self.kind, settings)
        self._processors = (
            *make_env_pre_post_processors(self.config, policy.config),
            *load_processors(checkpoint, policy),
        )

    def observations(self, policy: Any, demo_idx: int, count: int = 1) -> Iterator[dict[str, Any]]:
        """See `Task.observations`; `demo_idx` is the seed of the episode. What the policy's preprocessor returns."""
        check_count(count)
        inner = policy.act.policy
        seen = _Observed(inner, count * policy.n_action_steps)
        seen.install()
        try:
            self.rollout(policy, [demo_idx], noise_seed=0, n_envs=1)
        except _SeenEnoughError:
            pass
        finally:
            seen.remove()
        return iter(seen.observations[:: policy.n_action_steps])

    def rollout(
        self,
        policy: PolicyHandle,
        seeds: Sequence[int],
        *,
        noise_seed: int = 0,
        video_dir: str | Path | None = None,
        video_seeds: Sequence[int] = (),
        n_envs: int | None = None,
    ) -> Rollout:
        """See `Task.rollout`. Up to `n_envs` (10) at a time; a batch goes on until its last episode has ended.

        Raises:
            ValueError: as `Task.rollout`.
            RuntimeError: the environment cannot be made.
        """
        check_rollout(seeds, video_dir, video_seeds, n_envs)
        scores: dict[int, float] = {}
        num_steps: dict[int, int] = {}
        videos: dict[int, Path] = {}
        policy_seconds: list[float] = []
        start = time.perf_counter()
        size = min(n_envs or 10, len(seeds))
        for batch in (seeds[i : i + size] for i in range(0, len(seeds), size)):
            filmed = (
                {seed: Path(video_dir) / f"{seed}.mp4" for seed in video_seeds if seed in batch} if video_dir else {}
            )
            with seeded_noise(policy, noise_seed + batch[0]), closing(self._make(len(batch))) as environments:
                films = _Films({batch.index(seed): [] for seed in filmed})
                found = self._run(policy.act.policy, environments, batch, films, policy_seconds)  # type: ignore[union-attr]
            for i, seed in enumerate(batch):
                scores[seed] = self._score(found, i)
                num_steps[seed] = _length(found, i)
            for seed, path in filmed.items():
                _write(path, films.frames[batch.index(seed)][: num_steps[seed] + 1], self.config.fps)
                videos[seed] = path
        seconds = time.perf_counter() - start
        return Rollout(runner_log(scores, {}), policy_seconds, seconds - sum(policy_seconds), num_steps, videos)

    def _make(self, count: int) -> VectorEnv:
        """Environments of the first of the configuration's tasks."""
        try:
            (environments, *_) = next(iter(make_env(self.config, n_envs=count).values())).values()
        except ImportError as error:
            raise RuntimeError(f"the environment {self.name} cannot be made: {error}") from error
        return environments

    def _run(
        self,
        policy: PreTrainedPolicy,
        environments: VectorEnv,
        seeds: Sequence[int],
        render: Callable[[VectorEnv], None],
        seconds: list[float],
    ) -> Mapping[str, Tensor]:
        timed = Timed(policy, "select_action", torch.device(policy.config.device), seconds)
        timed.install()
        try:
            return lerobot_eval.rollout(
                environments,
                policy,
                *self._processors,
                seeds=list(seeds),
                render_callback=render,
            )
        finally:
            timed.remove()

    def _score(self, found: Mapping[str, Tensor], index: int) -> float:
        values = found["reward" if self.kind in _SCORED_BY_REWARD else "success"]
        return float(values[index, : _length(found, index)].max())


def load_subject(checkpoint: Path, environment: str, device: str) -> tuple[PolicyHandle, EnvironmentTask]:
    """The policy of a checkpoint, as what experiments evaluate, and its task.

    Raises:
        FileNotFoundError, ValueError, TypeError: as `load_policy`, `handle` and `EnvironmentTask`.
    """
    policy = load_policy(checkpoint, device)
    return handle(policy), EnvironmentTask(checkpoint, policy, environment)


def _environment_config(kind: str, settings: Sequence[str]) -> EnvConfig:
    try:
        given: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(settings)))
        return make_env_config(kind, **given)
    except (ValueError, TypeError, OmegaConfBaseException) as error:
        raise ValueError(f"--env {','.join([kind, *settings])}: {error}") from error


def _length(found: Mapping[str, Tensor], index: int) -> int:
    """How many steps an episode of a batch had."""
    return int((~found["done"][index]).sum()) + 1


def _write(path: Path, frames: Sequence[Frame], fps: int) -> None:
    with open_video(path, fps) as video:
        for frame in frames:
            video.append(frame)


class _Films:
    """Draws some environments of a batch at each step; `frames` has their index in it."""

    def __init__(self, frames: dict[int, list[Frame]]) -> None:
        self.frames = frames

    def __call__(self, environments: VectorEnv) -> None:
        if self.frames:
            drawn = environments.call("render")  # type: ignore[attr-defined]
            for index, frames in self.frames.items():
                frames.append(drawn[index])


class _SeenEnoughError(Exception):
    """Ends a rollout."""


class _Observed(Patch):
    """`select_action`, whose observations are kept, until there are `count`."""

    def __init__(self, policy: PreTrainedPolicy, count: int) -> None:
        super().__init__(policy, "select_action")
        self.count = count
        self.observations: list[dict[str, Any]] = []

    def run(self, batch: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.observations.append(
            {key: value for key, value in batch.items() if key == "task" or _is_observed(key, value)}
        )
        if len(self.observations) == self.count:
            raise _SeenEnoughError
        return self.original(batch, *args, **kwargs)


def _is_observed(key: str, value: Any) -> bool:
    return isinstance(value, Tensor) and not key.startswith(("action", "next."))
