"""Method -> plan, wherever its schedule comes from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from bacinfer.analysis.update_budget import check_budget
from bacinfer.core.apply import apply, left_as_found
from bacinfer.core.blocks import find_blocks
from bacinfer.core.engines import sampled_by
from bacinfer.core.plan import Fingerprint, SamplingPlan
from bacinfer.core.schedule import CacheSchedule, check_num_updates, even_interval
from bacinfer.experiments.method import Method
from bacinfer.experiments.schedules import ScheduleSource


def make_plan(policy: Any, method: Method, source: ScheduleSource) -> SamplingPlan:
    """The plan of a method for a plain policy, whose schedule, if it is to be found, comes from `source`.

    Raises:
        ValueError: numbers that do not fit the K or the blocks of the policy, or a sampler that cannot run it; and what
            `source` raises.
    """
    return make_plans(policy, [method], source)[method.spec]


def make_plans(policy: Any, methods: Iterable[Method], source: ScheduleSource) -> dict[str, SamplingPlan]:
    """The plans of methods, by their spelling; see `make_plan`."""
    made_for = Fingerprint.of(policy)
    return {method.spec: _make(policy, method, source, made_for) for method in methods}


def _make(policy: Any, method: Method, source: ScheduleSource, made_for: Fingerprint) -> SamplingPlan:
    warm_start = method.warm_start
    with sampled_by(policy, method.sampler) as sampling:
        cache = None if method.cache == "plain" else _schedule(sampling, method, source)
        if cache is not None and warm_start is not None:
            warm_start = replace(warm_start, cache=_spaced(policy, method, warm_start.sampler.num_steps))
    return SamplingPlan(cache, method.sampler, warm_start, made_for)


def _schedule(policy: Any, method: Method, source: ScheduleSource) -> CacheSchedule:
    K = policy.num_inference_steps
    check_num_updates(method.num_caches or 1, K, f"{method.spec}: num_caches")
    if method.budget is not None:
        check_budget(method.budget, K)
    is_found = method.metric is not None or method.budget is not None
    return source(policy, method) if is_found else _spaced(policy, method, K)


def _spaced(policy: Any, method: Method, num_steps: int) -> CacheSchedule:
    """The schedule of a method that says itself what is computed when."""
    keys = [block.key for block in find_blocks(policy.model)]
    if method.steps is not None:
        return CacheSchedule.unified(keys, num_steps, method.steps)
    if method.cache == "lossless":
        return CacheSchedule.every_step(keys, num_steps)
    interval = method.interval or even_interval(num_steps, min(method.num_caches or 1, num_steps))
    return CacheSchedule.periodic(keys, num_steps, interval)


@contextmanager
def applied(policy: Any, method: Method, plan: SamplingPlan, engine: str, precision: str | None) -> Iterator[Any]:
    """Inside, a policy samples by the plan that `make_plan` made of a method, and by no other; see `sampled_by`."""
    with left_as_found(policy), sampled_by(policy, method.sampler if method.as_it_is else None) as sampling:
        if not method.as_it_is:
            apply(policy, plan, engine=engine, precision=precision, stateful=True)
        yield sampling
