"""Tasks that this project simulates itself: observations and rollouts of a policy, whatever the simulator."""

from __future__ import annotations

import time
import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from bacinfer.core.calls import CallStream, policy_device, timed_call
from bacinfer.tasks.base import Rollout, check_count, check_rollout, runner_log
from bacinfer.tasks.disturbances import DisturbableSimulator, DisturbedSimulator, check_disturbable
from bacinfer.tasks.episodes import Episode, Progress, Recorder, Recording, Simulator
from bacinfer.tasks.video import open_video
from bacinfer.tasks.workers import Pending, Workers, default_num_workers

N_ENVS = 50
SMALLEST_HALF = 16
"""Episodes in the smaller batch from which on two are run in turns: a policy's call takes hardly less for fewer."""


StateVectors = Mapping[str, tuple[str, slice]]
"""Vectors as parts of an observation's entries: the robot's own ``state``, and its surroundings' where it is observed,
``environment_state``."""


class SimulatedTask(ABC):
    """A task for any policy that takes what its simulator observes, each entry [B, n_obs_steps, ...], and gives action
    chunks.

    Attributes:
        name: the task's name.
        fps: environment steps in a second of the simulated world.
        description: what the robot is to do, in words.
        state_vectors: what data sets keep of an observation besides a picture.
        disturbed_before: the steps of an episode before one of which its simulator, a `DisturbableSimulator`, can be
            disturbed; empty where it cannot.
    """

    name: str
    fps: int
    description: str
    state_vectors: ClassVar[StateVectors]
    disturbed_before = range(0)

    def __init__(self, n_obs_steps: int, max_steps: int) -> None:
        self.n_obs_steps = n_obs_steps
        self.max_steps = max_steps

    @abstractmethod
    def simulator(self, seed: int) -> Simulator:
        """An environment at the initial state of a seed; the seed determines it."""

    def episode(self, seed: int, recordings: Sequence[Recording] = (), *, disturb: bool = False) -> Episode:
        """An episode at its first observation, which `Episode.execute` takes on."""
        simulator = self.simulator(seed)
        if disturb:
            simulator = DisturbedSimulator(cast(DisturbableSimulator, simulator), seed, self.disturbed_before)
        return Episode(seed, simulator, self.n_obs_steps, self.max_steps, recordings)

    def observations(self, policy: Any, demo_idx: int, count: int = 1) -> Iterator[dict[str, Tensor]]:
        """See `Task.observations`; `demo_idx` is the seed of the initial state."""
        check_count(count)
        episode = self.episode(demo_idx)
        noise = CallStream(policy, demo_idx)
        observations: list[dict[str, Tensor]] = []
        while True:
            observations.append(_to_policy([episode.observation], policy))
            if len(observations) == count:
                break
            with noise:
                action, _ = timed_call(policy, observations[-1])
            episode.execute(action["action"][0].cpu().numpy())
            if episode.done:
                break
        return iter(observations)

    def rollout(
        self,
        policy: Any,
        seeds: Sequence[int],
        *,
        noise_seed: int = 0,
        video_dir: str | Path | None = None,
        video_seeds: Sequence[int] = (),
        n_envs: int | None = None,
        n_workers: int | None = None,
        recordings: Sequence[Recording] = (),
        disturb: bool = False,
    ) -> Rollout:
        """One episode per seed, up to `n_envs` (50) at a time, in two batches that take turns if they are large enough.

        While the policy acts for one batch, `n_workers` processes step the environments of the other (None: one per
        processor core, or 0, this process alone, for few episodes). Each batch keeps its composition until its last
        episode ends, and has sampling noise of its own that starts at `noise_seed` + its first seed. So two policies
        that draw the same number of samples see the same noise at the same call of the same episode, whatever
        `n_workers` is; another `n_envs` forms other batches.

        Every state of every episode is shown to its `recordings`, in the process that steps the environment. With
        `disturb` each episode is disturbed once, as its seed determines (see `disturbances`).

        An episode that an exception breaks counts in no score: it is in the rollout's `failures`, and in a warning.

        Raises:
            ValueError: no seeds, repeated seeds, videos of seeds that are not rolled out, or a task that cannot be
                disturbed.
            RuntimeError: all episodes failed; the simulator is not installed, for instance.
        """
        check_rollout(seeds, video_dir, video_seeds, n_envs)
        if disturb:
            check_disturbable(self)
        n_envs = n_envs or N_ENVS
        videos = {seed: Path(video_dir) / f"{seed}.mp4" for seed in video_seeds} if video_dir else {}
        if videos:
            recordings = [*recordings, _VideoRecording(videos, self.fps)]
        if n_workers is None:
            n_workers = default_num_workers(min(n_envs, len(seeds)))

        start = time.perf_counter()
        progress: dict[int, Progress] = {}
        policy_seconds: list[float] = []
        batch_size, batches_at_once = _batch_size(len(seeds), n_envs)
        batches = [seeds[i : i + batch_size] for i in range(0, len(seeds), batch_size)]
        with (
            tqdm(total=len(batches) * self.max_steps, desc=f"{self.name} rollout", unit="step") as bar,
            closing(Workers(n_workers, partial(self.episode, recordings=recordings, disturb=disturb))) as workers,
        ):
            waiting, running = deque(batches), deque[_Batch]()
            while waiting or running:
                while waiting and len(running) < batches_at_once:
                    running.append(_Batch(waiting.popleft(), workers, policy, noise_seed))
                batch = running.popleft()
                bar.update(batch.wait())
                if batch.done:
                    bar.update(self.max_steps - batch.num_steps)
                    progress |= batch.progress
                    continue
                policy_seconds.append(batch.act())
                running.append(batch)
        seconds = time.perf_counter() - start

        failures = {seed: error for seed in seeds if (error := progress[seed].error) is not None}
        _report(failures, len(seeds))
        finished = {seed: progress[seed] for seed in seeds if seed not in failures}
        return Rollout(
            log=runner_log({seed: episode.score for seed, episode in finished.items()}, failures),
            policy_seconds=policy_seconds,
            env_seconds=seconds - sum(policy_seconds),
            num_steps={seed: episode.num_steps for seed, episode in finished.items()},
            videos={seed: path for seed, path in videos.items() if seed in finished},
            failures=failures,
        )


class _Batch:
    """Episodes that share the policy's calls from their first observation to the last one's end, and their noise."""

    def __init__(self, seeds: Sequence[int], workers: Workers, policy: Any, noise_seed: int) -> None:
        self._policy = policy
        self._stream = CallStream(policy, noise_seed + seeds[0])
        self._workers = workers
        self._worker_of = {seed: i % len(workers) for i, seed in enumerate(seeds)}
        self._observations: dict[int, dict[str, NDArray[np.float32]]] = {}
        self.progress = {seed: Progress(None) for seed in seeds}
        self._pending: list[Pending] = [
            workers.start(worker, [seed for seed in seeds if self._worker_of[seed] == worker])
            for worker in sorted(set(self._worker_of.values()))
        ]

    @property
    def done(self) -> bool:
        return all(episode.done for episode in self.progress.values())

    @property
    def num_steps(self) -> int:
        """Of the longest episode."""
        return max(episode.num_steps for episode in self.progress.values())

    def wait(self) -> int:
        """Waits for the environments; how many steps they have done since."""
        before = self.num_steps
        for pending in self._pending:
            self.progress |= pending()
        for seed, episode in self.progress.items():
            if episode.observation is not None:
                self._observations[seed] = episode.observation
        return max(0, self.num_steps - before)

    def act(self) -> float:
        """Lets the policy act, and the environments begin to execute its actions; the wall time of the policy's call.

        Episodes that are done stay in the batch with their last observation: the noise of the others depends on it.
        """
        stand_in = next(iter(self._observations.values()))  # of an episode that broke before its first observation
        batch = [self._observations.get(seed, stand_in) for seed in self.progress]
        with self._stream:
            action, seconds = timed_call(self._policy, _to_policy(batch, self._policy))
        actions = dict(zip(self.progress, action["action"].cpu().numpy(), strict=True))
        chunks: dict[int, dict[int, NDArray[np.floating]]] = {}
        for seed, episode in self.progress.items():
            if not episode.done:
                chunks.setdefault(self._worker_of[seed], {})[seed] = actions[seed]
        self._pending = [self._workers.execute(worker, chunk) for worker, chunk in chunks.items()]
        return seconds


@dataclass(frozen=True)
class _VideoRecording:
    """Films the episodes of some seeds."""

    paths: Mapping[int, Path]
    fps: int

    def __call__(self, seed: int) -> AbstractContextManager[Recorder]:
        return self._film(seed) if seed in self.paths else nullcontext(lambda state: None)

    @contextmanager
    def _film(self, seed: int) -> Iterator[Recorder]:
        with open_video(self.paths[seed], self.fps) as video:
            yield lambda state: video.append(state.render())


def _batch_size(num_episodes: int, n_envs: int) -> tuple[int, int]:
    """Episodes in a batch, and how many batches take turns: one of up to `n_envs`, or two of half as many."""
    half = min(n_envs // 2, (num_episodes + 1) // 2)
    return (half, 2) if half >= SMALLEST_HALF else (min(n_envs, num_episodes), 1)


def _to_policy(observations: Sequence[Mapping[str, NDArray[np.float32]]], policy: Any) -> dict[str, Tensor]:
    """A batch of episodes' observations, each entry [B, n_obs_steps, ...], on the policy's device."""
    device = policy_device(policy)
    return {
        name: torch.from_numpy(np.stack([each[name] for each in observations])).to(device) for name in observations[0]
    }


def _report(failures: Mapping[int, str], num_episodes: int) -> None:
    """A warning that names the failed episodes; RuntimeError if there are no others."""
    if not failures:
        return
    listed = "; ".join(f"seed {seed}: {error}" for seed, error in failures.items())
    if len(failures) == num_episodes:
        raise RuntimeError(f"all {num_episodes} episodes failed: {listed}")
    warnings.warn(
        f"{len(failures)} of {num_episodes} episodes failed and count in no score: {listed}",
        RuntimeWarning,
        stacklevel=3,
    )
