"""Which timesteps are denoised, and by which formula, as plain, frozen data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

KINDS = ("own", "ddim", "dpm")


@dataclass(frozen=True)
class Sampler:
    """The denoising steps of one call.

    Attributes:
        kind: ``own``, the policy's noise scheduler; ``ddim`` (Song et al., 2021, eq. 12) or ``dpm``, DPM-Solver++(2M)
            (Lu et al., 2022, algorithm 2; SDE-DPM-Solver++(2M) with eta 1), on its noise levels.
        steps: N, which the scheduler spaces as it does; or the timesteps themselves, in descending order (units: the
            policy's training timesteps, 0 the least noisy).
        eta: The share of DDPM's noise that ``ddim`` and ``dpm`` add at each step, 0 (none: deterministic) to 1.

    Raises:
        ValueError: the kind is unknown, there are no steps, they do not descend, or eta is out of its range or given
            to the policy's own scheduler.
    """

    kind: str
    steps: int | tuple[int, ...]
    eta: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown sampler {self.kind!r}; there are {', '.join(KINDS)}")
        if isinstance(self.steps, (list, tuple)):
            object.__setattr__(self, "steps", tuple(self.steps))
        timesteps = self.timesteps
        if timesteps is None and not (_is_integer(self.steps) and self.num_steps >= 1):
            raise ValueError(f"a sampler takes at least one step, got {self.steps!r}")
        if timesteps is not None and not (
            timesteps
            and all(_is_integer(t) and t >= 0 for t in timesteps)
            and all(t > following for t, following in pairwise(timesteps))
        ):
            raise ValueError(f"timesteps must be integers >= 0 in descending order, got {list(timesteps)}")
        if not 0 <= self.eta <= 1 or (self.eta and self.kind == "own"):
            raise ValueError(f"eta is the noise of ddim and dpm, from 0 to 1; got {self.eta} for sampler {self.kind!r}")

    @property
    def timesteps(self) -> tuple[int, ...] | None:
        """The timesteps themselves, where they are given."""
        return self.steps if isinstance(self.steps, tuple) else None

    @property
    def num_steps(self) -> int:
        """N, the number of denoising steps of a call."""
        return len(self.steps) if isinstance(self.steps, tuple) else self.steps

    @property
    def spec(self) -> str:
        """As methods spell it: ``own:10``, ``dpm:6``, ``ddim:40-20-0``, ``ddim:5:0.5`` with eta."""
        steps = self.steps if isinstance(self.steps, int) else "-".join(map(str, self.steps))
        return f"{self.kind}:{steps}" + (f":{self.eta:g}" if self.eta else "")

    def to_data(self) -> dict[str, Any]:
        """The sampler as JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_data(cls, data: Any) -> Sampler:
        """The sampler that `to_data` described; raises ValueError if it is something else."""
        if not isinstance(data, dict) or data.keys() != {"kind", "steps", "eta"}:
            raise ValueError(f"not a sampler: {str(data)[:200]}")
        steps = data["steps"]
        return cls(data["kind"], tuple(steps) if isinstance(steps, list) else steps, data["eta"])


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
