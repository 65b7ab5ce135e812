"""Processes that step environments while this one computes actions.

They are started when first needed, serve every rollout after that, and end with this process.
"""

from __future__ import annotations

import os
import signal
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future
from contextlib import suppress
from typing import Any

from numpy.typing import NDArray

from bacinfer.tasks.episodes import Episode, EpisodeHost, Progress

EPISODES_PER_WORKER = 8
"""Fewer are stepped sooner than a process is started for them."""

Pending = Callable[[], dict[int, Progress]]
"""Waits for episodes to get on; their progress by seed."""


def default_num_workers(num_episodes: int) -> int:
    """As many as there are processor cores, but none for a handful of episodes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, num_episodes // EPISODES_PER_WORKER)


class Workers:
    """An `EpisodeHost` in each of `num_workers` processes, or a single one in this process if that is 0.

    `make_episode` is sent to the processes: it must be something that pickle or cloudpickle can send.

    Raises:
        RuntimeError: loky, which manages the processes, is not installed.
    """

    def __init__(self, num_workers: int, make_episode: Callable[[int], Episode]) -> None:
        if num_workers < 0:
            raise ValueError(f"n_workers = {num_workers}: expected 0 (no other processes) or more")
        self._make_episode = make_episode
        self._key = uuid.uuid4().hex
        self._host = None if num_workers else EpisodeHost(make_episode)
        self._processes = [self._open(worker) for worker in range(num_workers)]

    def __len__(self) -> int:
        return len(self._processes) or 1

    def start(self, worker: int, seeds: Sequence[int]) -> Pending:
        return self._call(worker, "start", list(seeds))

    def execute(self, worker: int, chunks: Mapping[int, NDArray[Any]]) -> Pending:
        return self._call(worker, "execute", dict(chunks))

    def close(self) -> None:
        """Breaks off the episodes that are not done."""
        if self._host is not None:
            self._host.close()
        for executor, _ in self._processes:
            with suppress(BrokenExecutor):
                executor.submit(_close, self._key)

    def _call(self, worker: int, method: str, argument: Any) -> Pending:
        if self._host is not None:
            progress = getattr(self._host, method)(argument)
            return lambda: progress
        executor, opened = self._processes[worker]
        future: Future[dict[int, Progress]] | None = None
        with suppress(BrokenExecutor):
            future = executor.submit(_call, self._key, method, argument)

        def result() -> dict[int, Progress]:
            with suppress(BrokenExecutor):
                opened.result()
                if future is not None:
                    return future.result()
            if self._processes[worker] == (executor, opened):
                self._processes[worker] = self._open(worker)
            return {seed: Progress(None, done=True, error="its process died") for seed in argument}

        return result

    def _open(self, worker: int) -> tuple[Executor, Future[None]]:
        """A host in the process of that number, or in a new one if that died."""
        executor = _executor(worker)
        try:
            return executor, executor.submit(_open, self._key, self._make_episode)
        except BrokenExecutor:
            executor = _executor(worker, dead=executor)
            return executor, executor.submit(_open, self._key, self._make_episode)


_executors: dict[int, Executor] = {}
_executors_lock = threading.Lock()


def _executor(worker: int, dead: Executor | None = None) -> Executor:
    """The process of a number: one process each, since an episode stays where it was started."""
    with _executors_lock:
        if _executors.get(worker) in (None, dead):
            _executors[worker] = _start_process()
        return _executors[worker]


def _start_process() -> Executor:
    try:
        from loky import ProcessPoolExecutor
    except ImportError as error:
        raise RuntimeError("rollouts in several processes need loky: pip install loky") from error
    # A simulator of its own for every core: threads inside them would only get into each other's way.
    return ProcessPoolExecutor(1, initializer=_leave_interrupts_to_the_parent, env={"OMP_NUM_THREADS": "1"})


# What follows runs in the processes.

_hosts: dict[str, EpisodeHost] = {}


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _open(key: str, make_episode: Callable[[int], Episode]) -> None:
    _hosts[key] = EpisodeHost(make_episode)


def _call(key: str, method: str, argument: Any) -> dict[int, Progress]:
    return getattr(_hosts[key], method)(argument)


def _close(key: str) -> None:
    _hosts.pop(key).close()
