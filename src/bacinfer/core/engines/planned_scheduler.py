"""A plan's sampler in the place of a policy's noise scheduler."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bacinfer.core.engines.base import Phase, UnsupportedPolicyError
from bacinfer.core.engines.denoising_steps import DenoisingSteps, plan_steps, read_steps
from bacinfer.core.handle import PolicyHandle
from bacinfer.core.sampler import Sampler


class PlannedScheduler:
    """Takes the steps of a sampler, on the noise levels of a policy's own scheduler, as which it passes otherwise.

    Attributes:
        own: The policy's own scheduler.
        sampler: The steps to take.
    """

    def __init__(self, own: Any, sampler: Sampler) -> None:
        self.own = own
        self.sampler = sampler
        self.set_timesteps(sampler.num_steps)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "own":  # while it is being copied it has none yet
            raise AttributeError(name)
        return getattr(self.own, name)

    def planned(self, num_inference_steps: int) -> DenoisingSteps:
        """The first steps of the sampler, of the scheduler as it is now."""
        steps = plan_steps(self.own, self.sampler)
        return DenoisingSteps(steps.steps[:num_inference_steps], steps.clip)

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """As of diffusers: a loop goes over `timesteps` afterwards."""
        self._planned = self.planned(num_inference_steps)
        self.timesteps = torch.tensor(self._planned.timesteps, device=device)
        self.num_inference_steps = num_inference_steps

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: torch.Generator | None = None,
        **arguments: Any,
    ) -> SimpleNamespace:
        """As of diffusers: `prev_sample` is the sample after the step at a timestep.

        Raises:
            RuntimeError: it is called with other arguments, which the plan decides.
        """
        if any(arguments.values()):
            raise RuntimeError(f"the plan's sampler {self.sampler.spec} does not take {arguments}; remove the plan")
        step = next(step for step in self._planned.steps if step.timestep == int(timestep))
        if step.draws_noise:
            noise = torch.randn(sample.shape, dtype=sample.dtype, device=sample.device, generator=generator)
        else:
            noise = torch.zeros_like(sample)
        return SimpleNamespace(prev_sample=self._planned.next_sample(step, sample, model_output, noise))


def own_scheduler(policy: Any) -> Any:
    """The policy's own noise scheduler, also where a plan's sampler is in its place."""
    scheduler = policy.noise_scheduler
    return scheduler.own if isinstance(scheduler, PlannedScheduler) else scheduler


def steps_of(scheduler: Any, num_inference_steps: int) -> DenoisingSteps:
    """The steps of a policy's scheduler, or of the sampler in its place; raises as `read_steps` and `plan_steps`."""
    if isinstance(scheduler, PlannedScheduler):
        return scheduler.planned(num_inference_steps)
    return read_steps(copy.deepcopy(scheduler), num_inference_steps)


def warm_steps(policy: Any, phase: Phase) -> DenoisingSteps:
    """The steps of a phase with a sampler of its own, on the noise levels of the policy's scheduler."""
    assert phase.sampler is not None
    return plan_steps(own_scheduler(policy), phase.sampler)


class SwitchedSampler:
    """A sampler that stands in the attributes `noise_scheduler` and `num_inference_steps` of a policy while installed.

    Raises:
        ValueError: the policy cannot be sampled so.
    """

    def __init__(self, policy: Any, sampler: Sampler) -> None:
        if isinstance(policy, PolicyHandle):
            raise ValueError(
                f"sampler {sampler.spec}: a handle names no scheduler whose steps could be changed; make a handle of "
                f"the policy that takes {sampler.num_steps} steps by itself"
            )
        scheduler: Any = getattr(policy, "noise_scheduler", None)
        self._policy = policy
        self._new: dict[str, Any] = {"num_inference_steps": sampler.num_steps}
        try:
            if sampler.kind == "ddim" or sampler.timesteps is not None:
                self._new["noise_scheduler"] = PlannedScheduler(scheduler, sampler)
            elif hasattr(scheduler, "config"):
                num_levels = scheduler.config["num_train_timesteps"]
                if sampler.num_steps > num_levels:
                    raise UnsupportedPolicyError(
                        f"it was trained with {num_levels} timesteps, which {sampler.spec} exceeds"
                    )
        except UnsupportedPolicyError as error:
            raise ValueError(f"sampler {sampler.spec} cannot run this policy: {error}") from error
        self._before: dict[str, Any] = {}

    def install(self) -> None:
        own = vars(self._policy)
        self._before = {name: own[name] for name in self._new if name in own}
        for name, value in self._new.items():
            setattr(self._policy, name, value)

    def check(self) -> None:
        """Raises RuntimeError if somebody set one of the attributes since: undoing would undo their change."""
        for name, value in self._new.items():
            found = getattr(self._policy, name)
            if found is not value and found != value:
                raise RuntimeError(
                    f"policy.{name} was set to {found!r} after the plan was applied; undo that first, then remove the "
                    f"plan"
                )

    def remove(self) -> None:
        for name in self._new:
            if name in self._before:
                setattr(self._policy, name, self._before[name])
            else:
                delattr(self._policy, name)


@contextmanager
def sampled_by(policy: Any, sampler: Sampler | None) -> Iterator[SwitchedSampler | None]:
    """Inside, a plain policy takes a sampler's steps in its own loop; None: its own.

    Raises:
        ValueError: the policy cannot be sampled so.
    """
    if sampler is None:
        yield None
        return
    switched = SwitchedSampler(policy, sampler)
    switched.install()
    try:
        yield switched
    finally:
        switched.remove()
