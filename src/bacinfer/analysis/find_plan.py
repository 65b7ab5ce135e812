"""Observations -> plan: when each residual block of a policy has to be recomputed (BAC, arXiv 2506.13456)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tqdm import tqdm

from bacinfer.analysis.block_statistics import BlockStatistics
from bacinfer.analysis.residuals import DEFAULT_SEED, record_all
from bacinfer.analysis.similarity import find_metric
from bacinfer.analysis.update_steps import check_budgets, optimal_update_steps
from bacinfer.core.apply import left_as_found
from bacinfer.core.blocks import find_blocks
from bacinfer.core.bubbling import bubbling_union, select_blocks
from bacinfer.core.engines import sampled_by
from bacinfer.core.handle import Policy, PolicyHandle
from bacinfer.core.plan import Fingerprint, SamplingPlan
from bacinfer.core.sampler import Sampler
from bacinfer.core.schedule import CacheSchedule

Schedules = dict[str, dict[int, CacheSchedule]]  # metric, then M


def find_plan(
    policy: Policy | PolicyHandle,
    observations: Iterable[Any],
    num_updates: int = 10,
    num_bu_blocks: int = 5,
    metric: str = "cosine",
    *,
    sampler: Sampler | None = None,
    noise_seed: int = DEFAULT_SEED,
) -> SamplingPlan:
    """Finds the BAC plan of a policy: update steps for each block, after bubbling union, and the last step.

    The plain policy samples once at each observation, and the residuals of all denoising steps are compared. The plan
    equals what ``bacinfer steps`` finds at the same observations of one demo, the default one. The policy and torch's
    random state are left as they were; a plan that is applied to it is set aside meanwhile.

    Args:
        policy: A policy, or its handle.
        observations: What the policy samples at, on its device, dicts of tensors [B, ...] for instance; one is enough,
            several make a plan that suits more of them. They are taken one by one, and may come from a generator.
        num_updates: M, the update steps of each block that are searched for, in 1..K.
        num_bu_blocks: How many blocks of largest error bubbling union extends; 0 for none.
        metric: How residuals are compared: ``cosine``, ``mse``, ``l1``, ``l2`` or ``wasserstein``.
        sampler: The plan's denoising steps; None: the policy's own K.
        noise_seed: Of the sampling noise, of which each observation draws its own.

    Raises:
        TypeError: the policy lacks a part.
        ValueError: the sampler cannot run the policy, a number is out of its range, the metric is unknown, there is no
            observation, a residual is not finite, or the model has no layer of a registered class.
        RuntimeError: the policy does not take K denoising steps, or is in train mode with dropout.
    """
    find_metric(metric)
    statistics = BlockStatistics([metric])
    with left_as_found(policy):
        made_for = Fingerprint.of(policy)
    with left_as_found(policy), sampled_by(policy, sampler):
        handle = PolicyHandle.of(policy)
        (M,) = check_budgets([num_updates], handle.num_inference_steps, "num_updates")
        num_blocks = len(find_blocks(handle.model))
        if not 0 <= num_bu_blocks <= num_blocks:
            raise ValueError(f"num_bu_blocks must be in 0..{num_blocks}, the number of blocks, got {num_bu_blocks}")
        seen = tqdm(observations, desc="recording the policy", unit="observation")
        for recording in record_all(policy, seen, noise_seed):
            statistics.add(recording.residuals)
        if statistics.num_observations == 0:
            raise ValueError("there are no observations to find a plan at: give at least one")
        schedule = find_schedules(statistics, [metric], [M])[metric][M]
        if num_bu_blocks:
            schedule = bubbling_union(schedule, select_blocks(statistics.block_errors(), num_bu_blocks))
    return SamplingPlan(schedule.with_last_step(), sampler=sampler, made_for=made_for)


def find_schedules(statistics: BlockStatistics, metrics: Iterable[str], budgets: Sequence[int]) -> Schedules:
    """The schedule of all blocks for every metric and budget, without bubbling union.

    Raises:
        ValueError: if a budget is not in 1..K.
    """
    schedules: Schedules = {}
    for metric in metrics:
        maximise = find_metric(metric).maximise
        matrices = statistics.matrices(metric)
        found = {b: optimal_update_steps(s, budgets, maximise=maximise) for b, s in matrices.items()}
        schedules[metric] = {
            budget: CacheSchedule(
                len(next(iter(matrices.values()))),
                {block: steps[budget] for block, steps in found.items()},
                f"optimal {metric}, M = {budget}",
            )
            for budget in budgets
        }
    return schedules
