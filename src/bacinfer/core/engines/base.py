"""What every engine provides. An engine executes a schedule on a policy; it decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from bacinfer.core.blocks import Block
from bacinfer.core.schedule import CacheSchedule

CACHE_ATTRIBUTE = "_bacinfer_cache"  # of a cached policy: the cache that is applied to it


class Engine(Protocol):
    """Executes a schedule. All that changes while a cached policy runs lives in its engine.

    Attributes:
        name: What `apply_cache(engine=...)` calls it.
    """

    name: ClassVar[str]

    def __init__(self, policy: Any, blocks: Sequence[Block], schedule: CacheSchedule) -> None:
        """Checks that it can run `schedule` on `policy`, which it leaves as it is."""

    def attach(self) -> None:
        """Changes the policy in place, so that `predict_action` runs the schedule."""

    def detach(self) -> None:
        """Leaves the policy exactly as `attach` found it."""

    def begin(self) -> None:
        """Starts a denoising trajectory: the next model call is step 0, and no residual is stored."""
