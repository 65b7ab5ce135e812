"""How long one call of a policy takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from bacinfer.tasks.base import seeded_noise, timed_call

NUM_WARMUP_CALLS = 3


@dataclass(frozen=True)
class Latency:
    """Wall time of `predict_action`, in seconds: median, 95th and 99th percentile of `num_calls` calls."""

    p50: float
    p95: float
    p99: float
    num_calls: int


def measure_latency(policy: Any, obs: dict[str, Tensor], num_calls: int = 20) -> Latency:
    """Times `num_calls` calls on one observation (a robot's batch is 1), after three that do not count.

    On CUDA the device is synchronised before and after each call.

    Raises:
        ValueError: no calls.
    """
    if num_calls < 1:
        raise ValueError(f"the latency of {num_calls} calls: expected at least one")
    with seeded_noise(policy, 0):
        calls = [timed_call(policy, obs)[1] for _ in tqdm(range(NUM_WARMUP_CALLS + num_calls), "latency", unit="call")]
    p50, p95, p99 = map(float, np.percentile(calls[NUM_WARMUP_CALLS:], [50, 95, 99]))
    return Latency(p50, p95, p99, num_calls)


def actions_per_second(policy: Any, latency: Latency) -> float:
    """Actions that a policy delivers per second of computation: n_action_steps / median latency."""
    return policy.n_action_steps / latency.p50
