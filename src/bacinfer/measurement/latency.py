"""How long one call of a policy takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from bacinfer.core.calls import seeded_noise, timed_call

NUM_WARMUP_CALLS = 3


@dataclass(frozen=True)
class Latency:
    """Wall time of a call, in seconds: median, 95th and 99th percentile of `num_calls` calls."""

    p50: float
    p95: float
    p99: float
    num_calls: int


def measure_latency(policy: Any, obs: Any, num_calls: int = 20) -> Latency:
    """Times `num_calls` calls on one observation (a robot's batch is 1), after three that do not count.

    On CUDA the device is synchronised before and after each call.

    Raises:
        ValueError: no calls.
    """
    return measure_latencies(policy, obs, {"": lambda: None}, num_calls)[""]


def measure_latencies(
    policy: Any, obs: Any, variants: Mapping[str, Callable[[], None]], num_calls: int = 20
) -> dict[str, Latency]:
    """Times the variants of a policy in turn, so that a machine whose load changes favours none.

    All else is as in `measure_latency`.

    Args:
        variants: A name to what turns the policy into that variant.
    """
    if num_calls < 1:
        raise ValueError(f"the latency of {num_calls} calls: expected at least one")
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    with seeded_noise(policy, 0):
        for _ in tqdm(range(NUM_WARMUP_CALLS + num_calls), "latency", unit="call"):
            for name, become in variants.items():
                become()
                seconds[name].append(timed_call(policy, obs)[1])
    return {name: _latency(times[NUM_WARMUP_CALLS:]) for name, times in seconds.items()}


def _latency(seconds: Sequence[float]) -> Latency:
    p50, p95, p99 = map(float, np.percentile(seconds, [50, 95, 99]))
    return Latency(p50, p95, p99, len(seconds))


def actions_per_second(policy: Any, latency: Latency) -> float:
    """Actions that a policy delivers per second of computation: n_action_steps / median latency."""
    return policy.n_action_steps / latency.p50
