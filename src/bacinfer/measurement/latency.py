"""How long one call of a policy takes, and how that divides into encoding what was observed and denoising."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from bacinfer.core.apply import Applied, applied_to, switch
from bacinfer.core.calls import owner_of, policy_device, seeded_noise, timed, timed_call
from bacinfer.core.handle import PolicyHandle
from bacinfer.core.patching import Patch

NUM_WARMUP_CALLS = 3

_Name = TypeVar("_Name")


@dataclass(frozen=True)
class Latency:
    """Wall time of a call, in seconds: median, 95th and 99th percentile of `num_calls` calls.

    Attributes:
        encoder: Median of what a call takes before and after its denoising loop, most of it for encoding pictures where
            the policy sees. None where the loop is no method of its own, as Diffusion Policy's `conditional_sample` is.
        denoising: Median of the loop itself; likewise.
    """

    p50: float
    p95: float
    p99: float
    num_calls: int
    encoder: float | None = None
    denoising: float | None = None


def measure_latency(policy: Any, obs: Any, num_calls: int = 20) -> Latency:
    """Times `num_calls` calls on one observation (a robot's batch is 1), after three that do not count.

    On CUDA the device is synchronised before and after each call and its denoising loop.

    Raises:
        ValueError: no calls.
    """
    return _timed_in_turn(policy, obs, {"": lambda: None}, num_calls)[""]


def measure_latencies(
    policy: Any, obs: Any, variants: Mapping[_Name, Applied | None], num_calls: int = 20
) -> dict[_Name, Latency]:
    """Times variants of a policy in turn, so that a machine whose load changes favours none; leaves it as it was.

    All else is as in `measure_latency`.

    Args:
        variants: Names to what is applied to the policy (see `core.apply.prepared`); None: nothing, the plain policy.
    """
    before = applied_to(policy)
    become = {name: partial(switch, policy, applied) for name, applied in variants.items()}
    try:
        return _timed_in_turn(policy, obs, become, num_calls)
    finally:
        switch(policy, before)


def _timed_in_turn(
    policy: Any, obs: Any, variants: Mapping[_Name, Callable[[], None]], num_calls: int
) -> dict[_Name, Latency]:
    """Variants by their names, each by what makes the policy it."""
    if num_calls < 1:
        raise ValueError(f"the latency of {num_calls} calls: expected at least one")
    seconds: dict[_Name, list[float]] = {name: [] for name in variants}
    denoising: dict[_Name, list[float]] = {name: [] for name in variants}
    with seeded_noise(policy, 0):
        for _ in tqdm(range(NUM_WARMUP_CALLS + num_calls), "latency", unit="call"):
            for name, become in variants.items():
                become()
                with _denoising_timed(policy) as loops:
                    seconds[name].append(timed_call(policy, obs)[1])
                denoising[name] += [sum(loops)] if loops else []
    return {name: _latency(seconds[name][NUM_WARMUP_CALLS:], denoising[name][NUM_WARMUP_CALLS:]) for name in variants}


@contextmanager
def _denoising_timed(policy: Any) -> Iterator[list[float]]:
    """Inside, the wall time of each denoising loop is added to the list, where the loop is a method of its own."""
    loop = policy.loop if isinstance(policy, PolicyHandle) else None
    owner = owner_of(policy) if loop is None else loop.owner
    loops: list[float] = []
    if not hasattr(owner, "conditional_sample"):
        yield loops
        return
    timed_loop = Timed(owner, "conditional_sample", policy_device(policy), loops)
    timed_loop.install()
    try:
        yield loops
    finally:
        timed_loop.remove()


class Timed(Patch):
    """A method, around what has replaced it already; the wall time of each call is added to `seconds`."""

    def __init__(self, owner: Any, name: str, device: torch.device, seconds: list[float]) -> None:
        super().__init__(owner, name)
        self.device, self.seconds = device, seconds

    def run(self, *args: Any, **kwargs: Any) -> Any:
        result, seconds = timed(partial(self.original, *args, **kwargs), self.device)
        self.seconds.append(seconds)
        return result


def _latency(seconds: Sequence[float], denoising: Sequence[float]) -> Latency:
    p50, p95, p99 = map(float, np.percentile(seconds, [50, 95, 99]))
    if not denoising:
        return Latency(p50, p95, p99, len(seconds))
    encoder = float(np.median(np.subtract(seconds, denoising)))
    return Latency(p50, p95, p99, len(seconds), encoder, float(np.median(denoising)))


def fast_enough(latencies: Mapping[str, float], most: float) -> list[str]:
    """The names of the plans that take at most so many seconds a call.

    Raises:
        ValueError: there are none; says which one comes nearest.
    """
    fast = [name for name, seconds in latencies.items() if seconds <= most]
    if not fast:
        nearest, seconds = min(latencies.items(), key=lambda item: item[1])
        raise ValueError(
            f"no plan takes {1e3 * most:.3g} ms a call or less on this machine; the nearest is {nearest} with "
            f"{1e3 * seconds:.3g} ms ({1 / seconds:.0f} calls a second)"
        )
    return fast


def divided(encoder: float | None, denoising: float | None) -> str:
    """How a call divides, in milliseconds, for tables; a dash where that is not known."""
    return "-" if encoder is None or denoising is None else f"{1e3 * encoder:.1f} + {1e3 * denoising:.1f}"


def actions_per_second(policy: Any, latency: Latency) -> float:
    """Actions that a policy delivers per second of computation: n_action_steps / median latency."""
    return policy.n_action_steps / latency.p50
