"""What `bacinfer bench` found, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from bacinfer.measurement.bench import Bench, Timing
from bacinfer.measurement.machine import Machine
from bacinfer.measurement.tables import format_table

_HEADER = ["plan", "engine", "precision", "batch", "median, ms", "p99, ms", "against plain", "products", "bandwidth"]


def format_bench(bench: Bench, policy: str, *, markdown: bool = False) -> str:
    """The machine, the table, and what its figures are.

    Args:
        policy: What was measured, as the first line says it.
    """
    lines = [
        f"{policy}; {machine_text(bench.machine)}.",
        "",
        format_table(_HEADER, [_cells(timing) for timing in bench.timings], markdown=markdown),
        "",
        f"{bench.num_calls} calls of each, taken in turn. Products: the share of the machine's large product in that "
        f"precision that the weights of self-attention and feed-forward blocks are multiplied at; bandwidth: the share "
        f"of a copy's that reading these weights at every step takes.",
    ]
    lines += [f"{variant.name}: {reason}." for variant, reason in bench.refused.items()]
    return "\n".join(lines)


def machine_text(machine: Machine) -> str:
    """The machine and its limits in one line."""
    kind = [machine.hardware, machine.instructions, f"{machine.threads} threads"]
    if machine.clock_mhz is not None:
        kind.append(f"{machine.clock_mhz:.0f} MHz")
    versions = f"Python {machine.python}, torch {machine.torch}, bacinfer {machine.bacinfer}"
    limits = (
        f"a product of 2048² runs at {machine.product_rate / 1e9:.0f} GFLOP/s in single precision and "
        f"{machine.product_rate_bf16 / 1e9:.0f} in bfloat16, a copy at {machine.bandwidth / 1e9:.0f} GB/s"
    )
    return f"{', '.join(filter(None, kind))}; {versions}; {limits}"


def bench_data(bench: Bench, policy: str) -> dict[str, Any]:
    """All of it as JSON can hold it; seconds, FLOP/s and bytes a second."""
    return {
        "policy": policy,
        "machine": asdict(bench.machine),
        "num_calls": bench.num_calls,
        "timings": [{**asdict(timing.variant), **_without_variant(timing)} for timing in bench.timings],
        "refused": [{**asdict(variant), "reason": reason} for variant, reason in bench.refused.items()],
    }


def _without_variant(timing: Timing) -> dict[str, Any]:
    return {name: value for name, value in vars(timing).items() if name != "variant"}


def _cells(timing: Timing) -> list[str]:
    variant = timing.variant
    return [
        variant.method,
        variant.engine or "-",
        variant.precision or "-",
        str(timing.batch),
        f"{1e3 * timing.p50:.1f}",
        f"{1e3 * timing.p99:.1f}",
        f"{timing.speedup:.1f}x",
        *("-" if share is None else f"{share:.0%}" for share in (timing.product_share, timing.bandwidth_share)),
    ]
