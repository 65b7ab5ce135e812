"""What is recomputed when: the update steps of every residual block, as plain, frozen data.

A schedule knows nothing of models or tensors. Other modules find the blocks (`blocks`) and execute the
schedule (`engines`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any

UPDATE, REUSE = "█", "·"
JSON_VERSION = 1


@dataclass(frozen=True)
class CacheSchedule:
    """The denoising steps at which each residual block is computed; its stored residual is reused at the others.

    Attributes:
        num_inference_steps: K, the number of denoising steps; step 0 is the noisiest, K-1 the last.
        update_steps: block key (``decoder.layers.0_sa_block``) to its update steps, step indices in ascending
            order, the first of them 0. A block that is not listed is computed at every step.
        label: how the schedule was made, for pictures and summaries.

    Raises:
        ValueError: if K < 1, or a block's steps are empty, unsorted, repeated, not integers, outside 0..K-1,
            or do not start at 0 (there is nothing to reuse before the first update).
    """

    num_inference_steps: int
    update_steps: Mapping[str, tuple[int, ...]]
    label: str = ""

    def __post_init__(self) -> None:
        if not _is_integer(self.num_inference_steps) or self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be an integer >= 1, got {self.num_inference_steps!r}")
        if not isinstance(self.update_steps, Mapping):
            raise ValueError(f"update_steps must map block keys to steps, got {type(self.update_steps).__name__}")
        checked = {
            block: check_update_steps(steps, self.num_inference_steps, block)
            for block, steps in self.update_steps.items()
        }
        object.__setattr__(self, "update_steps", MappingProxyType(checked))

    # -- constructors, one a mode ------------------------------------------------------------------------------

    @classmethod
    def every_step(cls, blocks: Iterable[str], num_inference_steps: int) -> CacheSchedule:
        """No caching: every block is computed at every step."""
        return cls.unified(blocks, num_inference_steps, range(num_inference_steps), label="every step")

    @classmethod
    def periodic(cls, blocks: Iterable[str], num_inference_steps: int, interval: int) -> CacheSchedule:
        """Mode 'threshold': all blocks at the steps k with ``k % interval == 0``."""
        if not _is_integer(interval) or interval < 1:
            raise ValueError(f"the caching interval (cache_threshold) must be an integer >= 1, got {interval!r}")
        return cls.unified(
            blocks,
            num_inference_steps,
            range(0, num_inference_steps, interval),
            label=f"threshold {interval}",
        )

    @classmethod
    def unified(
        cls, blocks: Iterable[str], num_inference_steps: int, steps: Iterable[int], label: str | None = None
    ) -> CacheSchedule:
        """Mode 'edit': one list of update steps for all blocks."""
        steps = tuple(steps)
        if label is None:
            label = f"edit, {len(steps)} steps"
        return cls(num_inference_steps, dict.fromkeys(blocks, steps), label)

    # -- schedule -> schedule ----------------------------------------------------------------------------------

    def with_last_step(self) -> CacheSchedule:
        """The schedule in which every block is also computed at the last step, K-1."""
        last = self.num_inference_steps - 1
        return replace(self, update_steps={b: _union(s, (last,)) for b, s in self.update_steps.items()})

    # -- reading -----------------------------------------------------------------------------------------------

    def update_mask(self, block: str) -> tuple[bool, ...]:
        """For each of the K steps, whether `block` is computed there."""
        if block not in self.update_steps:
            return (True,) * self.num_inference_steps
        steps = set(self.update_steps[block])
        return tuple(k in steps for k in range(self.num_inference_steps))

    def num_updates(self, block: str) -> int:
        return len(self.update_steps.get(block, range(self.num_inference_steps)))

    def picture(self, width: int = 100) -> str:
        """The schedule as text: a row per block, a column per step (█ computed, · reused).

        With more steps than `width` a column stands for several steps, and is █ if one of them is an update.
        """
        per_column = -(-self.num_inference_steps // max(1, width))
        names = max((len(b) for b in self.update_steps), default=0)
        title = f"{self.label or 'schedule'}: K = {self.num_inference_steps}, {len(self.update_steps)} blocks"
        if per_column > 1:
            title += f", {per_column} steps a column"
        rows = [title]
        for block, steps in self.update_steps.items():
            mask = self.update_mask(block)
            columns = (any(mask[k : k + per_column]) for k in range(0, len(mask), per_column))
            rows.append(f"{block:<{names}} {''.join(UPDATE if c else REUSE for c in columns)} {len(steps)}")
        return "\n".join(rows)

    def __str__(self) -> str:
        return self.picture()

    # -- JSON --------------------------------------------------------------------------------------------------

    def to_data(self) -> dict[str, Any]:
        """The schedule as JSON can hold it."""
        return {
            "version": JSON_VERSION,
            "num_inference_steps": self.num_inference_steps,
            "label": self.label,
            "update_steps": {block: list(steps) for block, steps in self.update_steps.items()},
        }

    @classmethod
    def from_data(cls, data: Any) -> CacheSchedule:
        """The schedule that `to_data` described.

        Raises:
            ValueError: if it is something else, of another version, or not a valid schedule.
        """
        if not isinstance(data, dict) or data.get("version") != JSON_VERSION:
            found = data.get("version") if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"expected a schedule of version {JSON_VERSION}, found {found!r}")
        try:
            return cls(data["num_inference_steps"], data["update_steps"], data["label"])
        except KeyError as error:
            raise ValueError(f"not a schedule, it has no {error}: {str(data)[:200]}") from error

    def to_json(self) -> str:
        return json.dumps(self.to_data(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> CacheSchedule:
        """The schedule that `to_json` wrote; raises ValueError as `from_data`, or if the text is not JSON."""
        return cls.from_data(json.loads(text))

    # A mappingproxy can neither be copied nor pickled, so both go through the constructor.

    def __reduce__(self) -> tuple[Any, ...]:
        return CacheSchedule, (self.num_inference_steps, dict(self.update_steps), self.label)

    def __hash__(self) -> int:
        return hash((self.num_inference_steps, frozenset(self.update_steps.items()), self.label))


def even_interval(num_inference_steps: int, num_caches: int) -> int:
    """⌈K / M⌉, the interval of at most M evenly spaced updates in K steps.

    Raises:
        ValueError: if M is not in 1..K.
    """
    check_num_updates(num_caches, num_inference_steps)
    return -(-num_inference_steps // num_caches)


def check_num_updates(num_updates: int, num_inference_steps: int, name: str = "num_caches") -> None:
    """Raises ValueError, which calls it `name`, if M is no possible number of update steps in K denoising steps."""
    if not _is_integer(num_updates) or not 1 <= num_updates <= num_inference_steps:
        raise ValueError(
            f"{name} must be an integer in 1..{num_inference_steps} (K, the number of denoising steps), "
            f"got {num_updates!r}"
        )


def check_update_steps(steps: Sequence[int], num_inference_steps: int, owner: str) -> tuple[int, ...]:
    """`steps` as a tuple, if they are valid update steps for `owner` (a block, a file).

    Raises:
        ValueError: as described at `CacheSchedule`.
    """
    if isinstance(steps, (str, bytes)) or not isinstance(steps, Iterable):
        raise ValueError(f"{owner}: update steps must be a list of integers, got {type(steps).__name__}")
    steps = tuple(steps)
    wrong = [s for s in steps if not _is_integer(s)]
    if wrong:
        raise ValueError(f"{owner}: update steps must be integers, found {wrong[:3]!r}")
    steps = tuple(int(s) for s in steps)
    if not steps or steps[0] != 0:
        raise ValueError(
            f"{owner}: the first update step must be 0, since nothing is stored before it; got {list(steps)[:5]}"
        )
    if any(a >= b for a, b in pairwise(steps)):
        raise ValueError(f"{owner}: update steps must ascend without repetition, got {list(steps)}")
    if steps[-1] >= num_inference_steps:
        raise ValueError(
            f"{owner}: update step {steps[-1]} does not exist with K = {num_inference_steps} denoising steps "
            f"(0..{num_inference_steps - 1}); was the schedule made for another K?"
        )
    return steps


def _is_integer(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _union(*steps: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(set().union(*steps)))
