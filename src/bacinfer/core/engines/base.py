"""What every engine provides. An engine executes a schedule on a policy; it decides nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from bacinfer.core.engines.sampling_call import SamplingCall
from bacinfer.core.engines.trajectory import Trajectory
from bacinfer.core.sampler import Sampler
from bacinfer.core.schedule import CacheSchedule

APPLIED = "_bacinfer"  # the attribute of a policy that holds what is applied to it


@dataclass(frozen=True)
class Phase:
    """A kind of trajectory that an engine executes: a plan's cold one, and its warm one where it has a warm start.

    Attributes:
        schedule: Which blocks are computed at which of its steps.
        sampler: Its steps; None: those of the policy's own loop.
    """

    schedule: CacheSchedule
    sampler: Sampler | None = None


class UnsupportedPolicyError(ValueError):
    """Why an engine cannot run a policy, as the end of a sentence about it ("its scheduler is a …")."""


@dataclass(frozen=True)
class EngineStatus:
    """How an engine runs a policy.

    Attributes:
        name: The engine that executes the schedule.
        reason: Why this one, where that was for the library to decide.
        buffer_bytes: Memory of its buffers, linear in batch, blocks, horizon and width; 0 before the first call.
        constant_bytes: Memory of packed weights, and of what depends on the timesteps alone.
        precision: Of products; None: the policy's own.
    """

    name: str
    reason: str = ""
    buffer_bytes: int = 0
    constant_bytes: int = 0
    precision: str | None = None


class Engine(Protocol):
    """Executes a schedule. All that changes while a cached policy runs lives in its engine.

    Attributes:
        name: What `apply_cache(engine=...)` calls it.
    """

    @property
    def name(self) -> str: ...

    @property
    def trajectory(self) -> Trajectory:
        """The state of the trajectory that runs."""
        ...

    @property
    def status(self) -> EngineStatus:
        """What runs the policy now."""
        ...

    def attach(self) -> None:
        """Changes the policy in place, so that sampling runs the schedule."""

    def detach(self) -> None:
        """Leaves the policy exactly as `attach` found it."""

    def refresh(self) -> None:
        """Reads the policy's weights anew at the next call, where the engine keeps any."""

    def begin(self) -> None:
        """Starts a denoising trajectory: the next model call is step 0, and no residual is stored."""

    def denoise(self, call: SamplingCall) -> Tensor:
        """The warm trajectory [B, T, A] of a call, from its start, in the place of the loop."""
        ...
