"""How actions are sampled, as plain, frozen data that is written to a file and read back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from bacinfer.core.handle import PolicyHandle
from bacinfer.core.sampler import Sampler
from bacinfer.core.schedule import CacheSchedule
from bacinfer.core.warm_start import WarmStart
from bacinfer.files import write_text

JSON_VERSION = 1


@dataclass(frozen=True)
class Fingerprint:
    """What a plan was made for: what its schedule depends on.

    Attributes:
        weights: Digest of the denoising model's parameters and buffers, by name, in single precision.
        num_inference_steps: K.
        scheduler: The settings of the noise scheduler and its class, where it is one of diffusers; the number of steps
            of a loop that calls the model several times a step.
    """

    weights: str
    num_inference_steps: int
    scheduler: Mapping[str, Any]

    @classmethod
    def of(cls, policy: Any) -> Fingerprint:
        """The fingerprint of a policy, or of a handle, as it is now."""
        handle = PolicyHandle.of(policy)
        digest = hashlib.sha256()
        for name, tensor in sorted(handle.model.state_dict().items()):
            values = tensor.detach().float() if tensor.is_floating_point() else tensor
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(values.cpu().contiguous().view(torch.uint8).numpy().tobytes() if values.numel() else b"")
        return cls(digest.hexdigest()[:32], handle.num_inference_steps, _scheduler_settings(handle) | _loop(handle))

    def differences(self, other: Fingerprint) -> list[str]:
        """What is different about `other`, for people."""
        names = [field.name for field in fields(self) if getattr(self, field.name) != getattr(other, field.name)]
        return [f"{name}: {getattr(self, name)}, here {getattr(other, name)}" for name in names]


def _scheduler_settings(handle: PolicyHandle) -> dict[str, Any]:
    scheduler: Any = None if handle.scheduler is None else getattr(*handle.scheduler, None)
    if not hasattr(scheduler, "config"):
        return {}
    settings = {name: value for name, value in dict(scheduler.config).items() if not name.startswith("_")}
    # as it comes back from a file
    return {"class": type(scheduler).__name__, **json.loads(json.dumps(settings, default=str))}


def _loop(handle: PolicyHandle) -> dict[str, int]:
    """The steps of a loop that calls the model several times a step, as many calls may be those of another loop."""
    num_steps = None if handle.num_steps is None else getattr(*handle.num_steps)
    return {} if num_steps in (None, handle.num_inference_steps) else {"num_steps": num_steps}


@dataclass(frozen=True)
class SamplingPlan:
    """How a policy samples its actions. Each part is optional; what is left out stays the policy's own.

    Attributes:
        cache: Which residual blocks are computed at which steps; None: all, at every step.
        sampler: The denoising steps; None: the policy's own K.
        warm_start: How a call that follows another one is sampled; None: like every other. A plan with a warm start
            keeps state between calls.
        made_for: The policy that the plan was made for; None: any that it fits.

    Raises:
        ValueError: the cache is for another number of steps than the sampler's.
    """

    cache: CacheSchedule | None = None
    sampler: Sampler | None = None
    warm_start: WarmStart | None = None
    made_for: Fingerprint | None = None

    def __post_init__(self) -> None:
        if self.cache is not None and self.sampler is not None:
            K = self.cache.num_inference_steps
            if K % self.sampler.num_steps:  # a loop may call the model several times a step
                raise ValueError(f"the cache is for {K} denoising steps, sampler {self.sampler.spec} takes others")

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON; the file appears whole or not at all."""
        write_text(Path(path), self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> SamplingPlan:
        """The plan in a file, which may also hold a schedule of its cache alone.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it holds no plan, or one of another version; names the file.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} holds no sampling plan: {error}") from error

    def to_json(self) -> str:
        data = {
            "bacinfer_plan": JSON_VERSION,
            "made_for": None if self.made_for is None else asdict(self.made_for),
            "sampler": None if self.sampler is None else self.sampler.to_data(),
            "warm_start": None if self.warm_start is None else self.warm_start.to_data(),
            "cache": None if self.cache is None else self.cache.to_data(),
        }
        return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, text: str) -> SamplingPlan:
        """The plan that `to_json` wrote, or one of the schedule that `CacheSchedule.to_json` wrote.

        Raises:
            ValueError: the text is something else, or of another version.
        """
        data = json.loads(text)
        if isinstance(data, dict) and "update_steps" in data:
            return cls(CacheSchedule.from_data(data))
        if not isinstance(data, dict) or data.get("bacinfer_plan") != JSON_VERSION:
            found = data.get("bacinfer_plan") if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"expected a plan of version {JSON_VERSION}, found {found!r}")
        unknown = sorted(data.keys() - {"bacinfer_plan", "made_for", "sampler", "warm_start", "cache"})
        if unknown:
            raise ValueError(f"it asks for {', '.join(unknown)}, which this version of bacinfer does not have")
        try:
            cache, made_for = data["cache"], data["made_for"]
            sampler, warm_start = data.get("sampler"), data.get("warm_start")  # plans of before have neither
            return cls(
                cache=None if cache is None else CacheSchedule.from_data(cache),
                sampler=None if sampler is None else Sampler.from_data(sampler),
                warm_start=None if warm_start is None else WarmStart.from_data(warm_start),
                made_for=None if made_for is None else Fingerprint(**made_for),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"a part is missing or damaged: {error}") from error
