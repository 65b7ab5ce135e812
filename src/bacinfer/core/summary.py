"""What a cache does to a policy, in figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bacinfer.core.schedule import CacheSchedule


@dataclass(frozen=True)
class BlockCounts:
    """How often a block is computed and how often its stored residual is reused in one trajectory."""

    updates: int
    reuses: int


@dataclass(frozen=True)
class CacheSummary:
    """What `FastDiffusionPolicy.summary` returns.

    Attributes:
        mode: 'original', 'threshold', 'optimal', 'edit', or 'schedule' for a schedule passed to `apply_cache`.
        engine: Name of the engine; None without a cache.
        num_inference_steps: K.
        blocks: Block key to its counts, for all blocks.
        flops_fraction: Share of the plain model's computation that is left, estimated from the number of weights
            that each block multiplies with. The cost of attention over long sequences, and condition tokens fewer
            than action tokens, are not in it; measure with `bacinfer eval`.
        warnings: What `apply_cache` warned of.
        schedule: The schedule; None without a cache.
    """

    mode: str
    engine: str | None
    num_inference_steps: int
    blocks: Mapping[str, BlockCounts]
    flops_fraction: float
    warnings: tuple[str, ...]
    schedule: CacheSchedule | None

    @property
    def mean_updates(self) -> float:
        """Updates per block, averaged over the blocks."""
        return sum(counts.updates for counts in self.blocks.values()) / len(self.blocks)

    def __str__(self) -> str:
        lines = [
            f"mode {self.mode}, engine {self.engine or 'none'}, K = {self.num_inference_steps}: "
            f"{self.mean_updates:.1f} updates a block, about {self.flops_fraction:.0%} of the FLOPs"
        ]
        lines += [f"warning: {warning}" for warning in self.warnings]
        if self.schedule is not None:
            lines.append(str(self.schedule))
        return "\n".join(lines)
