"""Warm starts while a policy runs: what is kept between its calls, and which of them start from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bacinfer.core.engines.base import Engine
from bacinfer.core.engines.fused.recognition import knows_loop
from bacinfer.core.engines.loops import ConditionalSample, ReplacedLoop
from bacinfer.core.engines.sampling_call import SamplingCall
from bacinfer.core.patching import Patch, remove_patches
from bacinfer.core.warm_start import Memory, WarmStart, disagreement


class WarmLoop(ReplacedLoop):
    """`conditional_sample`: from the memory of the last call where there is one, otherwise the loop itself.

    Args:
        policy: With a `conditional_sample` of Diffusion Policy's transformer policies.
        warm_start: How calls are sampled that follow another one.
        engine: What runs them, attached before this is installed.

    Attributes:
        memory: Of the calls that come next.
        on_disagreement: Is shown the disagreement [B] of each warm call.

    Raises:
        ValueError: the policy's loop is another one, it cannot be told that an episode starts, or how many steps are
            executed is unknown.
    """

    def __init__(self, policy: Any, warm_start: WarmStart, engine: Engine) -> None:
        super().__init__(ConditionalSample(policy))
        if not knows_loop(policy):
            raise ValueError(
                f"a warm start replaces the denoising loop, and {type(policy).__name__} has another one than Diffusion "
                f"Policy's transformer policies; use a plan without a warm start"
            )
        if not callable(getattr(policy, "reset", None)):
            raise ValueError(
                f"a warm start is forgotten when an episode starts, by policy.reset(), which {type(policy).__name__} "
                f"lacks; use a plan without a warm start"
            )
        num_executed = warm_start.num_executed or getattr(policy, "n_action_steps", None)
        if num_executed is None:
            raise ValueError(
                f"{type(policy).__name__} has no n_action_steps: give the warm start num_executed, the steps of a "
                f"trajectory that are executed between two calls"
            )
        self.warm_start = warm_start
        self.engine = engine
        self.num_executed: int = num_executed
        self.memory = Memory()
        self.on_disagreement: Callable[[Tensor], None] | None = None
        self._reset = _Reset(policy, self)

    def install(self) -> None:
        super().install()
        self._reset.install()

    def remove(self) -> None:
        remove_patches([self._reset])
        super().remove()

    def sample(self, call: SamplingCall) -> Tensor:
        if not self.engine.trajectory.is_running:  # not one of the policy's own calls
            return self.call_original(call)
        memory, last = self.memory, self.memory.continued(call.given, self.num_executed)
        memory.trajectory = None  # an exception forgets it
        sample = self.call_original(call) if last is None else self._warm(call, last)
        if sample.isfinite().all():  # what is not must not outlive the observation that it came from
            with torch.inference_mode(False):  # the next call may be one with gradients
                memory.trajectory = sample.detach().clone()
        return sample

    def _warm(self, call: SamplingCall, last: Tensor) -> Tensor:
        timesteps = self.warm_start.sampler.timesteps
        assert timesteps is not None
        alpha = self.loop.scheduler.alphas_cumprod[timesteps[0]].to(last)
        start = alpha.sqrt() * last + (1 - alpha).sqrt() * call.draw_noise()
        sample = self.engine.denoise(replace(call, start=start))
        threshold = self.warm_start.max_disagreement
        if threshold is None and self.on_disagreement is None:
            return sample
        moved = disagreement(sample, last, self.num_executed)
        if self.on_disagreement is not None:
            self.on_disagreement(moved)
        if threshold is None:
            return sample
        overtaken = ~(moved <= threshold)
        if overtaken.any():
            self.engine.begin()
            sample = torch.where(overtaken[:, None, None], self.call_original(call), sample)
        return sample


class _Reset(Patch):
    """`reset`: an episode starts."""

    def __init__(self, policy: Any, loop: WarmLoop) -> None:
        super().__init__(policy, "reset")
        self.loop = loop

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.loop.memory.trajectory = None
        return self.original(*args, **kwargs)
