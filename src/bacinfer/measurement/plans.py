"""What plans do to a policy, on observations alone: action error, latency and FLOPs, beside the plain policy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bacinfer.core.apply import Applied, left_as_found, prepared, switch
from bacinfer.core.calls import policy_device
from bacinfer.core.engines import AUTO
from bacinfer.core.handle import Policy, PolicyHandle
from bacinfer.core.plan import SamplingPlan
from bacinfer.core.schedule import CacheSchedule
from bacinfer.measurement.action_error import is_normalised, rms_difference, sampled_actions
from bacinfer.measurement.flops import count_flops
from bacinfer.measurement.latency import Latency, divided, measure_latencies
from bacinfer.measurement.statistics import CONFIDENCE, Estimate

PLAIN = "plain"


@dataclass(frozen=True)
class Measurement:
    """What a plan does to a policy.

    Attributes:
        action_error: RMS difference to the plain policy's actions at equal noise, with its interval over the
            observations.
        latency: Wall time of one call, in seconds.
        speedup: The plain policy's median latency over this one's.
        flops: Floating-point operations of one call.
        engine: What ran the plan; None for the plain policy.
    """

    action_error: Estimate
    latency: Latency
    speedup: float
    flops: int
    engine: str | None


@dataclass(frozen=True)
class Measurements:
    """What `bacinfer.measure` returns; ``str()`` of it is a table.

    Attributes:
        rows: The name of each plan to what it does, the plain policy first.
        noise_error: RMS difference between two draws of the plain policy's noise, to see an action error against.
        unit: What action errors are measured in: normalised actions, [-1, 1], where the policy has Diffusion Policy's
            normaliser; otherwise, and for a handle, the actions as they are returned.
        device: Where the policy ran.
        num_threads: PyTorch's threads.
    """

    rows: Mapping[str, Measurement]
    noise_error: Estimate
    unit: str
    device: str
    num_threads: int

    def __str__(self) -> str:
        width = max(map(len, self.rows))
        times = f"{'p50 / p95 / p99, ms':>23}  speedup  encoder + denoising, ms"
        lines = [f"{'':{width}}  {'action error':>23}  {times}     GFLOPs  engine"]
        lines += [f"{name:{width}}  {_cells(row)}" for name, row in self.rows.items()]
        error = self.noise_error
        over = "" if error.low is None else f", with its {CONFIDENCE:.0%} interval over {error.count} observations"
        lines += [
            f"Action error: RMS difference to the plain policy's actions at equal noise, {self.unit}{over}; between "
            f"two draws of the noise it is {_with_interval(error)}.",
            f"Latency: {self.rows[PLAIN].latency.num_calls} calls at the first observation, taken in turn, on "
            f"{self.device}, {self.num_threads} threads; encoder: what they take before and after the denoising loop.",
        ]
        return "\n".join(lines)


def measure(
    policy: Policy | PolicyHandle,
    plans: Mapping[str, SamplingPlan | CacheSchedule | str | Path],
    observations: Iterable[Any],
    *,
    engine: str = AUTO,
    num_calls: int = 20,
    noise_seed: int = 0,
) -> Measurements:
    """Measures what plans do to a policy, beside the plain policy; no simulator is needed.

    All of them see the same observations and the same noise, and are timed in turn. What they do to a score, only
    episodes can tell (``bacinfer eval``, ``bacinfer compare``). The policy and torch's random state are left as they
    were; a plan that is applied to it is set aside meanwhile.

    Args:
        policy: A policy, or its handle. It returns its actions [B, ...], or a dict of them, of which ``action_pred``
            is compared, or else ``action``.
        plans: Names to what `bacinfer.apply` takes. ``plain`` is the plain policy's name.
        observations: What the policy samples at, on its device, dicts of tensors [B, ...] for instance. Actions are
            compared at all of them; latency and FLOPs are those of a call at the first one (a robot's has B = 1).
        engine: What runs the plans, see `bacinfer.apply`.
        num_calls: How many calls of each are timed, after three that do not count.
        noise_seed: Of the sampling noise, of which each observation draws its own.

    Raises:
        TypeError: the policy lacks a part, a plan is something else, or the actions are no tensor.
        ValueError: there are no observations or no calls, a plan is named ``plain``, or it does not fit, as in
            `bacinfer.apply`.
        FileNotFoundError: a plan's file is missing.
        RuntimeError: the policy does not take K denoising steps, or is in train mode with dropout.
    """
    if not isinstance(plans, Mapping):
        raise TypeError(f"expected a dict of names to plans, got {type(plans).__name__}")
    if PLAIN in plans:
        raise ValueError(f"{PLAIN!r} is the plain policy's name, give the plan another")
    seen = list(observations)
    if not seen:
        raise ValueError("there are no observations to measure at: give at least one")
    with left_as_found(policy):
        variants: dict[str, Applied | None] = {PLAIN: None, **prepared(policy, plans, engine=engine)}

        actions, flops = {}, {}
        for name, applied in variants.items():
            switch(policy, applied)
            actions[name] = _actions(policy, seen, noise_seed)
            flops[name] = count_flops(policy, seen[0])
        switch(policy, None)
        latencies = measure_latencies(policy, seen[0], variants, num_calls)
        other_draw = _actions(policy, seen, noise_seed + len(seen))
    rows = {
        name: Measurement(
            rms_difference(actions[PLAIN], actions[name]),
            latencies[name],
            latencies[PLAIN].p50 / latencies[name].p50,
            flops[name],
            applied.engine.status.name if applied else None,
        )
        for name, applied in variants.items()
    }
    return Measurements(
        rows,
        rms_difference(actions[PLAIN], other_draw),
        "normalised units" if is_normalised(policy) else "in the units of the policy's actions",
        str(policy_device(policy)),
        torch.get_num_threads(),
    )


def _actions(policy: Any, observations: Sequence[Any], noise_seed: int) -> Tensor:
    return torch.cat([sampled_actions(policy, obs, noise_seed + index) for index, obs in enumerate(observations)])


def _cells(row: Measurement) -> str:
    error = "-" if row.engine is None else _with_interval(row.action_error)
    times = " / ".join(f"{1e3 * seconds:.1f}" for seconds in (row.latency.p50, row.latency.p95, row.latency.p99))
    parts = divided(row.latency.encoder, row.latency.denoising)
    engine = row.engine or "-"
    return f"{error:>23}  {times:>23}  {row.speedup:6.2f}x  {parts:>23}  {row.flops / 1e9:9.4f}  {engine}"


def _with_interval(error: Estimate) -> str:
    if error.low is None:
        return f"{error.mean:.4f}"
    return f"{error.mean:.4f} [{error.low:.4f}, {error.high:.4f}]"
