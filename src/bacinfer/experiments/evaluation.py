"""What a method makes of a policy: its cost, its actions and its episodes, beside the plain policy's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bacinfer.core.apply import summary
from bacinfer.core.engines import AUTO
from bacinfer.core.plan import SamplingPlan
from bacinfer.core.summary import CacheSummary
from bacinfer.experiments.method import PLAIN, Method
from bacinfer.experiments.plans import applied
from bacinfer.measurement.action_error import normalised_actions, rms_difference
from bacinfer.measurement.flops import count_flops
from bacinfer.measurement.latency import Latency, actions_per_second, measure_latency
from bacinfer.measurement.memory import peak_memory
from bacinfer.measurement.statistics import Estimate, estimate_paired_difference, estimate_score
from bacinfer.tasks import Rollout, Task

CALIBRATION_DEMO = 11
NUM_CALIBRATION_OBSERVATIONS = 16
AS_IT_IS = SamplingPlan()


@dataclass(frozen=True)
class Cost:
    """What one call of a policy at batch size 1 costs; `frequency` in actions per second, `peak_memory` in bytes."""

    latency: Latency
    frequency: float
    flops: int
    peak_memory: int | None


@dataclass(frozen=True, eq=False)
class Result:
    """What was measured of a method.

    Attributes:
        plain_latency: of the plain policy, timed just before in the same process.
        actions: [N, horizon, action_dim] (normalised) on N observations.
        num_inference_steps: denoising steps of a call; with a warm start, of one that follows another.
        plan: what was run; its cache and a `summary` are missing where the policy's own code ran.
    """

    cost: Cost
    plain_latency: Latency
    actions: Tensor
    rollout: Rollout
    num_inference_steps: int
    plan: SamplingPlan = AS_IT_IS
    summary: CacheSummary | None = None

    @property
    def score(self) -> Estimate | None:
        """The mean score of the episodes; None where the task scores no single episode."""
        scores = list(self.rollout.scores.values())
        return estimate_score(scores) if scores else None

    @property
    def speedup(self) -> float:
        """The plain policy's median latency over this one's."""
        return self.plain_latency.p50 / self.cost.latency.p50

    @property
    def mean_updates(self) -> float:
        """How often a block is computed, averaged over the blocks."""
        return self.num_inference_steps if self.summary is None else self.summary.mean_updates

    def action_error(self, plain: Result) -> Estimate:
        """RMS difference to the plain policy's actions, in normalised units, with equal noise."""
        return rms_difference(plain.actions, self.actions)

    def score_difference(self, plain: Result) -> Estimate | None:
        """The change of the score against the plain policy, over the seeds that both have; None if there are none.

        A run does not differ from itself, which needs no interval.
        """
        before, after = plain.rollout.scores, self.rollout.scores
        seeds = [seed for seed in before if seed in after]
        if not seeds:
            return None
        if plain is self:
            return Estimate(0.0, None, None, None, len(seeds))
        return estimate_paired_difference([before[seed] for seed in seeds], [after[seed] for seed in seeds])


def evaluate(
    policy: Any,
    task: Task,
    episode_seeds: Sequence[int],
    observations: Sequence[dict[str, Any]],
    method: Method = PLAIN,
    plan: SamplingPlan = AS_IT_IS,
    *,
    engine: str = AUTO,
    precision: str | None = None,
    latency_calls: int = 20,
    noise_seed: int = 0,
    n_envs: int | None = None,
    disturb: bool = False,
    video_dir: Path | None = None,
) -> Result:
    """Evaluates `method` on a plain policy, which it leaves plain.

    All methods see the same initial states and, as far as they draw it, the same sampling noise. The episodes come
    first: an environment that cannot run shows before anything slow. The plain policy is timed next to the method, so
    that a machine whose load changes favours neither.

    Args:
        episode_seeds: One episode each.
        observations: To time calls on and to compare actions on, see `calibration_observations`.
        plan: What `make_plan` gave for the method.
        engine: What runs the plan.
        precision: Of its products; None: the policy's own.
        latency_calls: How many calls are timed.
        n_envs: How many environments run at once; None for the task's own number.
        disturb: Whether each episode is disturbed once, in a task that `check_disturbable` admits.
        video_dir: Where the first seed's episode is filmed to; None films nothing.
    """
    options: dict[str, Any] = {} if n_envs is None else {"n_envs": n_envs}
    if disturb:
        options["disturb"] = True
    video_seeds = () if video_dir is None else episode_seeds[:1]
    with applied(policy, method, plan, engine, precision) as sampling:
        rollout = task.rollout(
            sampling, episode_seeds, noise_seed=noise_seed, video_dir=video_dir, video_seeds=video_seeds, **options
        )
    plain_latency = None if method == PLAIN else measure_latency(policy, observations[0], latency_calls)
    # applied anew: what an engine keeps for the batches of the episodes is no memory of a call at batch 1
    with applied(policy, method, plan, engine, precision) as sampling:
        cost = measure_cost(sampling, observations[0], latency_calls)
        if method.warm_start is not None:
            sampling.reset()  # the observations are an episode
        actions = normalised_actions(sampling, observations)
        found = summary(sampling)  # now, as the first call may have decided on the engine
        num_inference_steps, how = found.num_inference_steps, None if method.as_it_is else found
    return Result(cost, plain_latency or cost.latency, actions, rollout, num_inference_steps, plan, how)


def calibration_observations(policy: Any, task: Task) -> list[dict[str, Any]]:
    """The first observations of a training episode of the plain policy."""
    return list(task.observations(policy, CALIBRATION_DEMO, NUM_CALIBRATION_OBSERVATIONS))


def measure_cost(policy: Any, obs: Any, latency_calls: int) -> Cost:
    """What a call of the policy, as it is, costs on an observation of batch size 1."""
    latency = measure_latency(policy, obs, latency_calls)
    return Cost(latency, actions_per_second(policy, latency), count_flops(policy, obs), peak_memory(policy, obs))
