"""A plan's sampler in the place of a policy's noise scheduler."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bacinfer.core.engines.base import Phase, UnsupportedPolicyError
from bacinfer.core.engines.denoising_steps import DenoisingSteps, plan_steps, read_steps
from bacinfer.core.handle import PolicyHandle
from bacinfer.core.patching import Patch, remove_patches
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
        self._last: tuple[int, Tensor] | None = None  # a step and its x0, where the next step needs that
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
            RuntimeError: it is called with other arguments, which the plan decides; or out of turn, where a step needs
                the one before.
        """
        if any(arguments.values()):
            raise RuntimeError(f"the plan's sampler {self.sampler.spec} does not take {arguments}; remove the plan")
        steps, number = self._planned.steps, self._planned.timesteps.index(int(timestep))
        step, previous = steps[number], None
        if step.f:
            if self._last is None or self._last[0] != number - 1:
                raise RuntimeError(
                    f"{self.sampler.spec} takes its steps in their order, from the first; got {timestep}"
                )
            previous = self._last[1]
        if step.draws_noise:
            noise = torch.randn(sample.shape, dtype=sample.dtype, device=sample.device, generator=generator)
        else:
            noise = torch.zeros_like(sample)
        following, x0 = self._planned.next_sample(step, sample, model_output, noise, previous)
        is_needed = any(later.f for later in steps[number + 1 : number + 2])
        self._last = (number, x0) if is_needed else None
        return SimpleNamespace(prev_sample=following)


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


class _Attributes:
    """Values that stand in attributes of objects while installed; undone exactly."""

    def __init__(self, new: list[tuple[Any, str, Any]]) -> None:
        self._new = new  # object, name, value
        self._before: dict[int, Any] = {}  # of those that were the object's own, by their place

    def install(self) -> None:
        self._before = {i: vars(owner)[name] for i, (owner, name, _) in enumerate(self._new) if name in vars(owner)}
        for owner, name, value in self._new:
            setattr(owner, name, value)

    def check(self) -> None:
        """Raises RuntimeError if somebody set one of them since: undoing would undo their change."""
        for owner, name, value in self._new:
            found = getattr(owner, name)
            if found is not value and found != value:
                raise RuntimeError(
                    f"policy.{name} was set to {found!r} after the plan was applied; undo that first, then remove the "
                    f"plan"
                )

    def remove(self) -> None:
        for i, (owner, name, _) in enumerate(self._new):
            if i in self._before:
                setattr(owner, name, self._before[i])
            else:
                delattr(owner, name)


class _DuringCalls(Patch):
    """What samples, with other attributes while it does: what else reads them, to store them for instance, sees no
    plan."""

    def __init__(self, owner: Any, name: str, attributes: _Attributes) -> None:
        super().__init__(owner, name)
        self._attributes = attributes

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self._attributes.install()
        try:
            return self.original(*args, **kwargs)
        finally:
            self._attributes.remove()


class SwitchedSampler:
    """A sampler in the place of a policy's own number of steps and, where it needs it, noise scheduler.

    They are attributes of the policy, which has others while this is installed; or those that a handle names, which are
    others while it samples.

    Attributes:
        policy: What samples so: the policy, or a handle with the number of model calls that the sampler takes.

    Raises:
        ValueError: the policy cannot be sampled so.
    """

    def __init__(self, policy: Any, sampler: Sampler) -> None:
        self.policy = policy
        handle = PolicyHandle.of(policy)
        try:
            self._attributes = _Attributes(list(_attributes(handle, sampler)))
        except UnsupportedPolicyError as error:
            raise ValueError(f"sampler {sampler.spec} cannot run this policy: {error}") from error
        self._during_calls: _DuringCalls | None = None
        if isinstance(policy, PolicyHandle):
            self.policy = replace(policy, num_inference_steps=sampler.num_steps * _calls_a_step(policy))
            self._during_calls = _DuringCalls(*policy.sample, self._attributes)

    def install(self) -> None:
        (self._during_calls or self._attributes).install()

    def check(self) -> None:
        """Raises RuntimeError if somebody set one of the policy's attributes since."""
        if self._during_calls is None:
            self._attributes.check()

    def remove(self) -> None:
        if self._during_calls is None:
            self._attributes.remove()
        else:
            remove_patches([self._during_calls])

    @contextmanager
    def installed(self) -> Iterator[Any]:
        """Inside, it is; yields `policy`."""
        self.install()
        try:
            yield self.policy
        finally:
            self.remove()


def _attributes(handle: PolicyHandle, sampler: Sampler) -> Iterator[tuple[Any, str, Any]]:
    """Objects, attributes and the values with which the policy takes the sampler's steps."""
    if handle.num_steps is None:
        raise UnsupportedPolicyError("its handle names no num_steps, the attribute that its loop reads them from")
    scheduler: Any = None if handle.scheduler is None else getattr(*handle.scheduler, None)
    if sampler.kind != "own" or sampler.timesteps is not None:
        if handle.scheduler is None:
            raise UnsupportedPolicyError("its handle names no scheduler")
        yield (*handle.scheduler, PlannedScheduler(scheduler, sampler))
    elif hasattr(scheduler, "config"):
        num_levels = scheduler.config["num_train_timesteps"]
        if sampler.num_steps > num_levels:
            raise UnsupportedPolicyError(f"it was trained with {num_levels} timesteps, which {sampler.spec} exceeds")
    yield (*handle.num_steps, sampler.num_steps)


def _calls_a_step(handle: PolicyHandle) -> int:
    """Model calls of one step of the loop: several in an integrator of higher order."""
    assert handle.num_steps is not None
    num_steps = getattr(*handle.num_steps)
    calls, rest = divmod(handle.num_inference_steps, num_steps)
    if rest or not calls:
        raise ValueError(
            f"the handle has num_inference_steps = {handle.num_inference_steps}, but {handle.num_steps[1]} is "
            f"{num_steps}: make a handle of the policy as it is now"
        )
    return calls


@contextmanager
def sampled_by(policy: Any, sampler: Sampler | None) -> Iterator[Any]:
    """Inside, a plain policy takes a sampler's steps in its own loop; None: its own.

    Yields:
        The policy, or its handle with the number of model calls of the sampler.

    Raises:
        ValueError: the policy cannot be sampled so.
    """
    with nullcontext(policy) if sampler is None else SwitchedSampler(policy, sampler).installed() as sampling:
        yield sampling
