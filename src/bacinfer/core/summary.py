"""What a plan does to a policy, in figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from bacinfer.core.sampler import Sampler
from bacinfer.core.schedule import CacheSchedule
from bacinfer.core.warm_start import WarmStart


@dataclass(frozen=True)
class BlockCounts:
    """How often a block is computed and how often its stored residual is reused in one trajectory."""

    updates: int
    reuses: int


@dataclass(frozen=True)
class CacheSummary:
    """What `bacinfer.summary` returns.

    Attributes:
        mode: 'plan' for what `bacinfer.apply` applied, 'original' for a plain policy; else the mode of `apply_cache`,
            'original', 'threshold', 'optimal' or 'edit', or 'schedule' for a schedule that was passed to it.
        engine: Name of the engine that runs the schedule; None without a cache.
        precision: Of the engine's products; None: the policy's own.
        engine_reason: Why that one, where `engine='auto'` chose it.
        buffer_bytes: Memory of the engine's buffers, linear in batch, blocks, horizon and width; 0 until the first call
            and in the eager engine.
        constant_bytes: Memory of weights that the engine packed, and of what depends on the timesteps alone; likewise.
        num_inference_steps: Denoising steps of a call: K, those of the plan's sampler, or, where the plan has a warm
            start, those of a call that follows another one. `blocks`, `flops_fraction` and `schedule` are of that call.
        blocks: Block key to its counts, for all blocks.
        flops_fraction: Share of the plain model's computation that is left, estimated from the number of weights
            that each block multiplies with. The cost of attention over long sequences, and condition tokens fewer
            than action tokens, are not in it; measure with `bacinfer eval`.
        model_weights: How many weights the model multiplies with, at each of K steps.
        other_weights: The policy's other parts to how many they have: its image encoder, for instance, which runs once
            a call. They are in no share of FLOPs; how the time of a call divides, `bacinfer.measure` tells.
        warnings: What was warned of when the plan was applied.
        schedule: The schedule; None without a cache.
        sampler: The plan's; None: the policy's own steps.
        warm_start: The plan's; None without one.
    """

    mode: str
    engine: str | None
    precision: str | None
    engine_reason: str
    buffer_bytes: int
    constant_bytes: int
    num_inference_steps: int
    blocks: Mapping[str, BlockCounts]
    flops_fraction: float
    model_weights: int
    other_weights: Mapping[str, int]
    warnings: tuple[str, ...]
    schedule: CacheSchedule | None
    sampler: Sampler | None = None
    warm_start: WarmStart | None = None

    @property
    def mean_updates(self) -> float:
        """Updates per block, averaged over the blocks."""
        return sum(counts.updates for counts in self.blocks.values()) / len(self.blocks)

    def __str__(self) -> str:
        reason = f" ({self.engine_reason})" if self.engine_reason else ""
        reason += f" in {self.precision}" if self.precision else ""
        lines = [
            f"mode {self.mode}, engine {self.engine or 'none'}{reason}, K = {self.num_inference_steps}: "
            f"{self.mean_updates:.1f} updates a block, about {self.flops_fraction:.0%} of the FLOPs"
        ]
        if self.sampler is not None:
            lines.append(f"sampler {self.sampler.spec}")
        if self.warm_start is not None:
            lines.append(f"warm start {self.warm_start.sampler.spec}: these figures are of calls that follow another")
        if self.other_weights:
            others = ", ".join(f"{name} {count:,}" for name, count in self.other_weights.items())
            lines.append(
                f"weights: the model has {self.model_weights:,}, for each step; beside it, in no share of FLOPs: "
                f"{others} (bacinfer.measure tells how the time of a call divides)"
            )
        if self.buffer_bytes:
            lines.append(f"memory: buffers {_megabytes(self.buffer_bytes)}, weights {_megabytes(self.constant_bytes)}")
        lines += [f"warning: {warning}" for warning in self.warnings]
        if self.schedule is not None:
            lines.append(str(self.schedule))
        return "\n".join(lines)


def other_weights(owner: Any, model: nn.Module) -> dict[str, int]:
    """Entries of the weight matrices and kernels that a policy has beside its model, by the parts that they are in."""
    models_own = set(map(id, model.parameters()))
    found: Counter[str] = Counter()
    for name, parameter in owner.named_parameters() if isinstance(owner, nn.Module) else ():
        if parameter.ndim >= 2 and id(parameter) not in models_own:
            found[name.partition(".")[0]] += parameter.numel()
    return dict(found)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
