"""A policy with and without its cache, on the same episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bacinfer.core.diffusion_cache_wrapper import FastDiffusionPolicy
from bacinfer.evaluation.action_error import normalised_actions, rms_difference
from bacinfer.evaluation.flops import count_flops
from bacinfer.evaluation.latency import Latency, actions_per_second, measure_latency
from bacinfer.evaluation.statistics import Estimate, estimate_mean, estimate_paired_difference
from bacinfer.tasks import Rollout, Task

CALIBRATION_DEMO = 11
NUM_CALIBRATION_OBSERVATIONS = 16


@dataclass(frozen=True)
class Cost:
    """What one call of a policy at batch size 1 costs; `frequency` in actions per second."""

    latency: Latency
    frequency: float
    flops: int


@dataclass(frozen=True, eq=False)
class Result:
    """A policy's cost, its episodes, and its `actions` [N, horizon, action_dim] (normalised) on N observations."""

    cost: Cost
    actions: Tensor
    rollout: Rollout

    @property
    def score(self) -> Estimate | None:
        """The mean score of the episodes; None where the task scores no single episode."""
        scores = list(self.rollout.scores.values())
        return estimate_mean(scores) if scores else None

    def action_error(self, plain: Result) -> float:
        """RMS difference to the plain policy's actions, in normalised units, with equal noise."""
        return rms_difference(plain.actions, self.actions)

    def speedup(self, plain: Result) -> float:
        """The plain policy's median latency over this one's."""
        return plain.cost.latency.p50 / self.cost.latency.p50

    def score_difference(self, plain: Result) -> Estimate | None:
        """The change of the score against the plain policy, seed by seed; None where the task scores no episode."""
        before, after = plain.rollout.scores, self.rollout.scores
        if not before:
            return None
        return estimate_paired_difference(list(before.values()), [after[seed] for seed in before])


@dataclass(frozen=True, eq=False)
class Comparison:
    """The policy that was asked for, `fast`, next to the plain one; both are the same without a cache."""

    original: Result
    fast: Result


def compare(
    policy: Any,
    task: Task,
    seeds: Sequence[int],
    apply_cache: Callable[[Any], Any] | None,
    *,
    latency_calls: int = 20,
    video_dir: Path | None = None,
) -> Comparison:
    """Evaluates a plain `policy`, and with the cache that `apply_cache` puts on it; leaves it plain.

    Both see the same initial states and the same sampling noise, and their latencies are taken one after the other.
    `apply_cache` is None for the plain policy alone. With a `video_dir`, the first seed's episodes are filmed, into
    its subdirectories ``original`` and ``fast``.
    """
    if apply_cache is not None:  # a schedule that does not fit shows before anything slow
        FastDiffusionPolicy.remove_cache(apply_cache(policy))
    observations = calibration_observations(policy, task)
    cost, actions = measure(policy, observations, latency_calls)
    fast = None
    if apply_cache is not None:
        apply_cache(policy)
        try:
            fast_dir = video_dir / "fast" if video_dir is not None else None
            fast = evaluate(policy, task, seeds, observations, latency_calls=latency_calls, video_dir=fast_dir)
        finally:
            FastDiffusionPolicy.remove_cache(policy)
    original_dir = video_dir / "original" if video_dir is not None else None
    original = Result(cost, actions, _roll_out(policy, task, seeds, original_dir))
    return Comparison(original, fast or original)


def evaluate(
    policy: Any,
    task: Task,
    seeds: Sequence[int],
    observations: Sequence[dict[str, Tensor]],
    *,
    latency_calls: int = 20,
    video_dir: Path | None = None,
) -> Result:
    """Evaluates a policy as it is, plain or cached; with a `video_dir`, the first seed's episode is filmed."""
    cost, actions = measure(policy, observations, latency_calls)
    return Result(cost, actions, _roll_out(policy, task, seeds, video_dir))


def calibration_observations(policy: Any, task: Task) -> list[dict[str, Tensor]]:
    """The first observations of a training episode of the plain policy."""
    return list(task.observations(policy, CALIBRATION_DEMO, NUM_CALIBRATION_OBSERVATIONS))


def measure(policy: Any, observations: Sequence[dict[str, Tensor]], latency_calls: int) -> tuple[Cost, Tensor]:
    """What a call costs, and the normalised actions on the observations."""
    latency = measure_latency(policy, observations[0], latency_calls)
    cost = Cost(latency, actions_per_second(policy, latency), count_flops(policy, observations[0]))
    return cost, normalised_actions(policy, observations)


def _roll_out(policy: Any, task: Task, seeds: Sequence[int], video_dir: Path | None) -> Rollout:
    return task.rollout(policy, seeds, video_dir=video_dir, video_seeds=() if video_dir is None else seeds[:1])
