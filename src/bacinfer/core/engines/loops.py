"""Denoising loops that programs can stand for: where one is, what it is called with, and which steps it takes."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bacinfer.core.engines.base import UnsupportedPolicyError
from bacinfer.core.engines.denoising_steps import DenoisingSteps
from bacinfer.core.engines.planned_scheduler import own_scheduler, steps_of
from bacinfer.core.engines.sampling_call import SamplingCall
from bacinfer.core.patching import Patch

_ARGUMENTS = ("condition_data", "condition_mask", "cond", "generator")
_SET_WHILE_SAMPLING = ("timesteps", "num_inference_steps", "custom_timesteps")  # by a scheduler's set_timesteps


class Loop:
    """A method that denoises a trajectory, of an object with `noise_scheduler`, one of diffusers, and K.

    Args:
        owner: The object.

    Attributes:
        name: The method.
        functions: The owner's methods that a program stands for.
        takes_generator: Whether a call may name the generator that noise is drawn from.
    """

    name: ClassVar[str] = "conditional_sample"
    functions: ClassVar[tuple[str, ...]] = ("conditional_sample",)
    takes_generator: ClassVar[bool] = False

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    @property
    def model(self) -> nn.Module:
        """The denoising model."""
        raise NotImplementedError

    def read(self, *args: Any, **kwargs: Any) -> SamplingCall | None:
        """A call of it by these arguments; None: not one that samples with `model`."""
        raise NotImplementedError

    def arguments(self, call: SamplingCall) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments that `read` makes the call of."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises UnsupportedPolicyError unless the loop is called, and takes its steps, as programs know it."""
        self.steps(self.num_inference_steps)

    @property
    def num_inference_steps(self) -> int:
        """K; can be set."""
        return self.owner.num_inference_steps

    @num_inference_steps.setter
    def num_inference_steps(self, K: int) -> None:
        self.owner.num_inference_steps = K

    @property
    def calls_a_step(self) -> int:
        """Model calls of one of its steps, of which K is a multiple."""
        return 1

    @property
    def scheduler(self) -> Any:
        """The policy's own noise scheduler, also where a plan's sampler is in its place; None: it has none."""
        return own_scheduler(self.owner)

    def steps(self, num_inference_steps: int) -> DenoisingSteps:
        """What it does in so many steps; raises UnsupportedPolicyError if programs cannot do that."""
        return steps_of(self.owner.noise_scheduler, num_inference_steps)

    def settings(self) -> dict[str, Any]:
        """What its steps depend on, as it is now."""
        own = {name: value for name, value in vars(self.scheduler).items() if name not in _SET_WHILE_SAMPLING}
        return {"noise_scheduler": self.owner.noise_scheduler, **own}

    def finish(self) -> None:
        """Leaves the scheduler as the loop would."""
        scheduler, K = self.owner.noise_scheduler, self.num_inference_steps
        if scheduler.num_inference_steps != K:
            scheduler.set_timesteps(K)


class ConditionalSample(Loop):
    """`conditional_sample` of Diffusion Policy's transformer policies."""

    takes_generator = True

    @property
    def model(self) -> nn.Module:
        return self.owner.model

    def check(self) -> None:
        if not hasattr(self.owner, self.name):
            raise UnsupportedPolicyError(
                f"no program was written for the denoising loop of a {type(self.owner).__name__}"
            )
        for name in ("noise_scheduler", "model", "num_inference_steps"):
            if not hasattr(self.owner, name):
                raise UnsupportedPolicyError(f"it has no {name}")
        parameters = tuple(inspect.signature(self.owner.conditional_sample).parameters)
        if parameters[: len(_ARGUMENTS)] != _ARGUMENTS:
            raise UnsupportedPolicyError(f"its conditional_sample takes {parameters}, expected {_ARGUMENTS}")
        super().check()

    def read(self, *args: Any, **kwargs: Any) -> SamplingCall:
        return _sampling_call(*args, **kwargs)

    def arguments(self, call: SamplingCall) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = {"cond": call.condition, "generator": call.generator, **call.step_arguments}
        return (call.given, call.is_given), named


def _sampling_call(
    condition_data: Tensor,
    condition_mask: Tensor,
    cond: Tensor | None = None,
    generator: torch.Generator | None = None,
    **step_arguments: Any,
) -> SamplingCall:
    return SamplingCall(condition_data, condition_mask, cond, generator, step_arguments)


class ReplacedLoop(Patch):
    """Replaces a loop. Subclasses say by `sample` with what."""

    def __init__(self, loop: Loop) -> None:
        super().__init__(loop.owner, loop.name)
        self.loop = loop

    def sample(self, call: SamplingCall) -> Tensor:
        """The denoised trajectory [B, T, A] of a call."""
        raise NotImplementedError

    def call_original(self, call: SamplingCall) -> Tensor:
        args, kwargs = self.loop.arguments(call)
        return self.original(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Tensor:
        call = self.loop.read(*args, **kwargs)
        return self.original(*args, **kwargs) if call is None else self.sample(call)
