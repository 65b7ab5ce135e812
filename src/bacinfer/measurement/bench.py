"""How fast a policy is on a machine: plans in every engine and precision, beside the plain policy and the machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bacinfer.core.apply import Applied, left_as_found, prepared, switch
from bacinfer.core.calls import timed_call
from bacinfer.core.engines import PRECISIONS, PROGRAM_ENGINES
from bacinfer.core.plan import SamplingPlan
from bacinfer.measurement.latency import measure_latencies
from bacinfer.measurement.machine import Machine, measure_machine

PLAIN = "plain"
_BYTES_OF_A_WEIGHT = {None: 4, "bf16": 2, "int8": 1}


@dataclass(frozen=True)
class Variant:
    """A plan in an engine and a precision; `precision` None is the policy's own, `engine` None the plain policy."""

    method: str
    engine: str | None = None
    precision: str | None = None

    @property
    def name(self) -> str:
        return ", ".join(filter(None, (self.method, self.engine, self.precision)))


@dataclass(frozen=True)
class Timing:
    """A variant's calls.

    Attributes:
        p50, p99: Of their wall times, in seconds.
        speedup: Against the plain policy, timed in turn with it at the same batch.
        product_share: How much of the machine's product rate, in the variant's precision, the products with the
            weights of self-attention and feed-forward blocks make up; None where an engine does not say what it
            multiplies with, and for int8, whose rate is not measured.
        bandwidth_share: How much of its bandwidth it takes to read these weights once a step; None where an engine does
            not say.
    """

    variant: Variant
    batch: int
    p50: float
    p99: float
    speedup: float
    product_share: float | None
    bandwidth_share: float | None


@dataclass(frozen=True)
class Bench:
    """What `bench` found; `refused` are variants that cannot run, with the reasons."""

    machine: Machine
    num_calls: int
    timings: Sequence[Timing]
    refused: Mapping[Variant, str]


def bench(
    policy: Any,
    plans: Mapping[str, SamplingPlan],
    observation: Mapping[str, Tensor],
    *,
    engines: Sequence[str],
    batches: Sequence[int] = (1,),
    num_calls: int = 20,
) -> Bench:
    """Times every plan in every engine and precision that can run it, in turn with the plain policy.

    Args:
        policy: A policy, which is left as it was.
        plans: Names to plans.
        observation: A dict of tensors [1, ...], which is repeated for larger batches.
        engines: What runs the plans, names of `ENGINES`; what makes programs does so in every precision.
        num_calls: How many calls of each are timed, after three that do not count.

    Raises:
        ValueError: no calls, a batch below 1, or none of the variants can run.
    """
    if min(batches, default=0) < 1:
        raise ValueError(f"batches of {list(batches)}: expected at least one, of at least one observation each")
    machine = measure_machine(policy.device)
    with left_as_found(policy):
        able: dict[Variant, Applied | None] = {Variant(PLAIN): None}
        refused = {}
        for variant in _variants(plans, engines):
            try:
                able[variant] = _tried(policy, variant, plans[variant.method], observation)
            except (ValueError, RuntimeError) as error:
                refused[variant] = str(error)
        if len(able) == 1:
            raise ValueError("no engine can run any of the plans: " + "; ".join(dict.fromkeys(refused.values())))
        timings: list[Timing] = []
        for batch in batches:
            obs = {name: value.repeat(batch, *[1] * (value.ndim - 1)) for name, value in observation.items()}
            latencies = measure_latencies(policy, obs, able, num_calls)
            plain = latencies[Variant(PLAIN)].p50
            for variant, applied in able.items():
                found = latencies[variant]
                shares = _shares(policy, applied, variant, batch, found.p50, machine)
                timings.append(Timing(variant, batch, found.p50, found.p99, plain / found.p50, *shares))
    return Bench(machine, num_calls, timings, refused)


def _variants(plans: Mapping[str, SamplingPlan], engines: Sequence[str]) -> Iterator[Variant]:
    for method in plans:
        for engine in engines:
            yield Variant(method, engine)
            if engine in PROGRAM_ENGINES:
                yield from (Variant(method, engine, precision) for precision in PRECISIONS)


def _tried(policy: Any, variant: Variant, plan: SamplingPlan, observation: Mapping[str, Tensor]) -> Applied:
    """What runs a variant, after one call, at which programs are made."""
    (applied,) = prepared(
        policy, {"": plan}, engine=variant.engine or "", precision=variant.precision, stateful=True
    ).values()
    switch(policy, applied)
    try:
        timed_call(policy, observation)
    finally:
        switch(policy, None)
    return applied


def _shares(
    policy: Any, applied: Applied | None, variant: Variant, batch: int, seconds: float, machine: Machine
) -> tuple[float | None, float | None]:
    if applied is None or variant.engine not in PROGRAM_ENGINES:
        return None, None
    # the program folds cross-attention's projections into a few vectors, once a call
    schedule, blocks = applied.phases[-1].schedule, [block for block in applied.blocks if block.kind != "mha_block"]
    weights = sum(schedule.num_updates(block.key) * block.num_weights for block in blocks)
    rate = {None: machine.product_rate, "bf16": machine.product_rate_bf16}.get(variant.precision)  # of int8: not known
    rows = batch * policy.model.pos_emb.shape[1]  # tokens of the stack
    return (
        None if rate is None else 2 * rows * weights / seconds / rate,
        _BYTES_OF_A_WEIGHT[variant.precision] * weights / seconds / machine.bandwidth,
    )
