"""Observations -> plan: when each residual block of a policy has to be recomputed.

By how alike its residuals are (BAC, arXiv 2506.13456), or by what reusing them does to the action (`sensitivity`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from bacinfer.analysis.block_statistics import BlockStatistics
from bacinfer.analysis.residuals import DEFAULT_SEED, record_all
from bacinfer.analysis.sensitivity import holding_costs
from bacinfer.analysis.similarity import Array, find_metric
from bacinfer.analysis.update_budget import Curve, check_budget, spend
from bacinfer.analysis.update_steps import optimal_update_steps
from bacinfer.core.apply import left_as_found
from bacinfer.core.blocks import Block, find_blocks
from bacinfer.core.bubbling import bubbling_union, select_blocks
from bacinfer.core.engines import sampled_by
from bacinfer.core.handle import Policy, PolicyHandle
from bacinfer.core.plan import Fingerprint, SamplingPlan
from bacinfer.core.sampler import Sampler
from bacinfer.core.schedule import CacheSchedule, check_num_updates

MAX_ROUNDS = 4
"""In which a sensitivity-weighted schedule is found."""

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
    with left_as_found(policy):
        made_for = Fingerprint.of(policy)
        with sampled_by(policy, sampler) as sampling:
            handle = PolicyHandle.of(sampling)
            check_num_updates(num_updates, handle.num_inference_steps, "num_updates")
            num_blocks = len(find_blocks(handle.model))
            if not 0 <= num_bu_blocks <= num_blocks:
                raise ValueError(f"num_bu_blocks must be in 0..{num_blocks}, the number of blocks, got {num_bu_blocks}")
            statistics = observe_statistics(sampling, observations, metric, noise_seed)
    schedule = find_schedules(statistics, [metric], [num_updates])[metric][num_updates]
    if num_bu_blocks:
        schedule = bubbling_union(schedule, select_blocks(statistics.block_errors(), num_bu_blocks))
    return SamplingPlan(schedule.with_last_step(), sampler=sampler, made_for=made_for)


def find_sensitive_plan(
    policy: Policy | PolicyHandle,
    observations: Iterable[Any],
    budget: float,
    *,
    sampler: Sampler | None = None,
    noise_seed: int = DEFAULT_SEED,
) -> SamplingPlan:
    """Finds the plan that changes the actions least, to first order, for a budget of computation.

    The plain policy samples once at each observation, and its actions are differentiated with respect to what every
    block adds at every denoising step. The budget is shared by all blocks: those that matter more are computed more
    often. The policy with this cache is differentiated in its turn, and all derivatives together make the next
    schedule, until it stays the same or `MAX_ROUNDS` are over. The policy and torch's random state are left as they
    were; a plan that is applied to it is set aside meanwhile.

    Args:
        policy: A policy, or its handle, whose denoising loop can be differentiated.
        observations: As of `find_plan`; 8 from different episodes made good plans.
        budget: Computation of one call, in evaluations of all blocks, each weighted with how many weights it multiplies
            with; from 1, where every block is computed once, to the number of denoising steps.
        sampler: The plan's denoising steps; None: the policy's own K.
        noise_seed: Of the sampling noise, of which each observation draws its own.

    Raises:
        TypeError: the policy lacks a part.
        ValueError: the sampler cannot run the policy, its loop cannot be differentiated, the budget is out of its
            range, there is no observation, a residual is not finite, the model has no layer of a registered class, or a
            block names no weights.
        RuntimeError: the policy does not take K denoising steps, or is in train mode with dropout.
    """
    with left_as_found(policy):
        made_for = Fingerprint.of(policy)
        with sampled_by(policy, sampler) as sampling:
            cache = find_sensitive_schedule(sampling, observations, budget, noise_seed)
    return SamplingPlan(cache, sampler=sampler, made_for=made_for)


def observe_statistics(
    policy: Policy | PolicyHandle, observations: Iterable[Any], metric: str, noise_seed: int = DEFAULT_SEED
) -> BlockStatistics:
    """How alike the residuals of a plain policy are, over observations; at least one."""
    statistics = BlockStatistics([metric])
    seen = tqdm(observations, desc="recording the policy", unit="observation")
    for recording in record_all(policy, seen, noise_seed):
        statistics.add(recording.residuals)
    if statistics.num_observations == 0:
        raise ValueError("there are no observations to find a plan at: give at least one")
    return statistics


def unified_schedule(
    blocks: Sequence[Block], matrices: Mapping[str, Array], num_updates: int, metric: str
) -> CacheSchedule:
    """One schedule for all blocks, from the mean of similarity matrices [K, K], with the last step."""
    similarity = np.mean(list(matrices.values()), axis=0)
    steps = optimal_update_steps(similarity, [num_updates], maximise=find_metric(metric).maximise)[num_updates]
    label = f"unified {metric}, M = {num_updates}"
    keys = [block.key for block in blocks]
    return CacheSchedule.unified(keys, len(similarity), steps, label).with_last_step()


def find_sensitive_schedule(
    policy: Policy | PolicyHandle, observations: Iterable[Any], budget: float, noise_seed: int = DEFAULT_SEED
) -> CacheSchedule:
    """The schedule of `find_sensitive_plan` for a plain policy, as it samples; see there."""
    handle = PolicyHandle.of(policy)
    check_budget(budget, handle.num_inference_steps)
    shares = _shares_of_computation(find_blocks(handle.model))
    observations = list(observations)
    schedule, sums = None, dict.fromkeys(shares, np.zeros(()))
    for number in range(1, MAX_ROUNDS + 1):
        costs = holding_costs(policy, observations, noise_seed, schedule)
        sums = {block: sums[block] + of_block for block, of_block in costs.items()}
        steps = spend({block: Curve.of(of_block / number) for block, of_block in sums.items()}, shares, budget)
        found = CacheSchedule(handle.num_inference_steps, steps, f"sensitivity-weighted, {budget:g} evaluations")
        if found == schedule:
            break
        schedule = found
    return found


def _shares_of_computation(blocks: Sequence[Block]) -> dict[str, float]:
    """Block key to its share of what all compute; raises ValueError where a block names no weights."""
    weightless = [block.key for block in blocks if not block.num_weights]
    if weightless:
        raise ValueError(
            f"what {weightless} cost is not known, as they name no weights: register their layers with "
            f"ResidualBlock(..., weights=(...))"
        )
    total = sum(block.num_weights for block in blocks)
    return {block.key: block.num_weights / total for block in blocks}


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
