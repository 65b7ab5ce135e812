"""What a task is: a source of observations for analysis, and rollouts that score a policy."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

FIRST_TEST_SEED = 10_000
"""Seeds (or demonstration indices) below this are training ones, logged under ``train/``."""


@dataclass(frozen=True)
class Rollout:
    """What a policy scored, and where the time went.

    Attributes:
        log: the entries of Diffusion Policy's runner log: ``test/mean_score``, ``test/sim_max_reward_{seed}``, …
        policy_seconds: wall time of each `predict_action` call (one call serves all environments of a batch).
        env_seconds: wall time of everything else: simulation, observations, rendering.
        num_steps: environment steps of each seed, where the task knows them.
        videos: the video of each seed that one was asked for.
        failures: what broke each seed's episode that has no score for that reason.
    """

    log: Mapping[str, Any]
    policy_seconds: Sequence[float]
    env_seconds: float
    num_steps: Mapping[int, int] = field(default_factory=dict)
    videos: Mapping[int, Path] = field(default_factory=dict)
    failures: Mapping[int, str] = field(default_factory=dict)

    @property
    def scores(self) -> dict[int, float]:
        """The highest reward of each seed's episode; empty where the runner logs averages alone (kitchen)."""
        matches = {key: re.fullmatch(r"(?:train|test)/sim_max_reward_(\d+)", key) for key in self.log}
        return {int(match[1]): float(self.log[key]) for key, match in matches.items() if match}

    @property
    def mean_score(self) -> float:
        """The mean score of the test seeds, or of the training seeds if there were no others."""
        return float(self.log.get("test/mean_score", self.log.get("train/mean_score", float("nan"))))


class Task(Protocol):
    """A task as analysis and evaluation use it; `make_task` finds the right one for a checkpoint."""

    @property
    def name(self) -> str: ...

    def observations(self, policy: Any, demo_idx: int, count: int = 1) -> Iterator[dict[str, Tensor]]:
        """The observations of the first `count` policy calls of one episode, each of batch size 1.

        `demo_idx` below 10000 is a training start (a seed or a demonstration's index), from 10000 on a test seed.
        They are collected before the first one is returned, so nothing of the caller's runs in between. An
        episode that ends earlier gives fewer.
        """
        ...

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
        """One episode per seed, up to `n_envs` at a time (None: the task's own number).

        Rollouts with equal `seeds`, `noise_seed` and `n_envs` see equal sampling noise. The process's random state is
        left as it was.
        """
        ...


def check_count(count: int) -> None:
    if count < 1:
        raise ValueError(f"count = {count}: expected at least one observation")


def check_rollout(
    seeds: Sequence[int], video_dir: str | Path | None, video_seeds: Sequence[int], n_envs: int | None
) -> None:
    """Raises ValueError for arguments that no rollout can have."""
    if not seeds:
        raise ValueError("no seeds to roll out: give at least one")
    if len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds must be distinct and not negative, found {list(seeds)}")
    if not set(video_seeds) <= set(seeds):
        raise ValueError(f"videos of {list(video_seeds)} asked for, but the seeds are {list(seeds)}")
    if video_seeds and video_dir is None:
        raise ValueError("videos asked for without a video_dir to put them in")
    if n_envs is not None and n_envs < 1:
        raise ValueError(f"n_envs = {n_envs}: expected at least one environment")


def runner_log(scores: Mapping[int, float], failures: Mapping[int, str]) -> dict[str, float | str]:
    """Diffusion Policy's runner log: each seed's score, the mean of test and of training seeds; and what failed."""
    log: dict[str, float | str] = {}
    for prefix in ("train/", "test/"):
        group = {seed: score for seed, score in scores.items() if _prefix(seed) == prefix}
        log |= {f"{prefix}sim_max_reward_{seed}": score for seed, score in group.items()}
        if group:
            log[f"{prefix}mean_score"] = float(np.mean(list(group.values())))
    return log | {f"{_prefix(seed)}error_{seed}": error for seed, error in failures.items()}


def _prefix(seed: int) -> str:
    return "test/" if seed >= FIRST_TEST_SEED else "train/"
