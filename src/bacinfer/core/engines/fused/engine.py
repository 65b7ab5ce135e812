"""The engines that run the whole denoising loop as one static program (see `program`), compiled once and reused.

They replace `policy.conditional_sample`, the loop around the noise scheduler in Diffusion Policy's transformer
policies. All else is the eager engine's: a loop of the user's own, observers, calls of the model outside of sampling.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from bacinfer.core.blocks import Block
from bacinfer.core.engines.base import EngineStatus, UnsupportedPolicyError
from bacinfer.core.engines.eager import EagerEngine
from bacinfer.core.engines.fused.buffers import SamplingCall
from bacinfer.core.engines.fused.cuda_graph import CapturedProgram
from bacinfer.core.engines.fused.denoiser import read_denoiser
from bacinfer.core.engines.fused.native import NativeProgram
from bacinfer.core.engines.fused.native_library import NativeUnavailableError
from bacinfer.core.engines.fused.program import Program
from bacinfer.core.engines.fused.program_cache import ProgramCache, Runner, not_known, run
from bacinfer.core.engines.fused.recognition import unknown_function
from bacinfer.core.engines.fused.sampler import read_sampler
from bacinfer.core.patching import Patch
from bacinfer.core.schedule import CacheSchedule

logger = logging.getLogger("bacinfer")

_ARGUMENTS = ("condition_data", "condition_mask", "cond", "generator")


class FusedEngine(EagerEngine):
    """Runs `conditional_sample` as one program, on any device.

    Its actions are those of the eager engine up to rounding, and carry no gradients.

    Raises:
        ValueError: if the policy is not built like Diffusion Policy's transformer policies.
        RuntimeError: at `predict_action`, if its sampling turns out to compute something else; and as `EagerEngine`.
    """

    name: ClassVar[str] = "fused"
    known_functions_only: ClassVar[bool] = False

    def __init__(self, policy: Any, blocks: Sequence[Block], schedule: CacheSchedule) -> None:
        super().__init__(policy, blocks, schedule)
        self.programs = ProgramCache(blocks, schedule, self._make_runner, self.known_functions_only)
        self.obstacle: str | None = None  # why the last call ran in the eager engine
        try:
            _check_sampling(policy, schedule.num_inference_steps)
            read_denoiser(policy.model, blocks)
            self._check_device(policy.model.pos_emb.device)
            unknown = unknown_function(policy)
            if unknown is not None and self.known_functions_only:
                raise not_known(unknown)
        except UnsupportedPolicyError as error:
            self._refuse(error, ValueError)
        else:
            self.patches.append(_Sampling(policy, self))

    @staticmethod
    def _make_runner(program: Program) -> Runner:
        try:
            return NativeProgram(program)
        except NativeUnavailableError as error:
            if program.device.type == "cpu":
                _warn_once(f"programs run from Python, which is slower than compiled code: {error}")
            return program

    def _check_device(self, device: torch.device) -> None:
        """Raises UnsupportedPolicyError if the engine cannot run there."""

    @property
    def status(self) -> EngineStatus:
        return EngineStatus(self.name, "", self.programs.buffer_bytes, self.programs.constant_bytes)

    def refresh(self) -> None:
        self.programs.forget()

    def sample(self, patch: _Sampling, call: SamplingCall) -> Tensor:
        """`conditional_sample` as a program, or eagerly if there can be none and the engine allows it."""

        def plain(call: SamplingCall) -> Tensor:
            with self.trajectory.suspended():
                return patch.call_original(call)

        with self.trajectory.exclusive(), _plain_tensors():
            try:
                self._check_device(call.given.device)
                runner = self.programs.runner(self.policy, plain, call)
            except UnsupportedPolicyError as error:
                reason = error
            else:
                sample = run(runner, call)
                scheduler, K = self.policy.noise_scheduler, self.trajectory.num_inference_steps
                if scheduler.num_inference_steps != K:
                    scheduler.set_timesteps(K)  # as the loop would leave it
                self.trajectory.complete()
                self.obstacle = None
                return sample
        self._refuse(reason, RuntimeError)
        return patch.call_original(call)

    def _refuse(self, reason: UnsupportedPolicyError, error_class: type[Exception]) -> None:
        """What happens to a policy that no program can run."""
        raise error_class(f"engine {self.name!r} cannot run this policy: {reason}. engine='eager' can") from reason


class CudaGraphEngine(FusedEngine):
    """Runs `conditional_sample` as one CUDA graph."""

    name: ClassVar[str] = "cuda_graph"

    @staticmethod
    def _make_runner(program: Program) -> Runner:
        return CapturedProgram(program)

    def _check_device(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise UnsupportedPolicyError(f"it is on {device}, and CUDA graphs need it on a CUDA device")


class AutoEngine(FusedEngine):
    """The fastest engine that can run the policy where it is: a CUDA graph, a program, or the eager engine.

    A program only where every function that it replaces is one that programs were written for.
    """

    name: ClassVar[str] = "auto"
    known_functions_only: ClassVar[bool] = True

    @staticmethod
    def _make_runner(program: Program) -> Runner:
        engine = CudaGraphEngine if program.device.type == "cuda" else FusedEngine
        return engine._make_runner(program)

    @property
    def status(self) -> EngineStatus:
        if self.obstacle is not None:
            return EngineStatus(EagerEngine.name, f"chosen by 'auto', as {self.obstacle}")
        device = self.policy.model.pos_emb.device.type
        chosen = CudaGraphEngine if device == "cuda" else FusedEngine
        reason = f"chosen by 'auto', the fastest on {device}"
        return EngineStatus(chosen.name, reason, self.programs.buffer_bytes, self.programs.constant_bytes)

    def _refuse(self, reason: UnsupportedPolicyError, error_class: type[Exception]) -> None:
        if str(reason) != self.obstacle:
            logger.warning("the engine 'eager' runs this policy, as %s", reason)
        self.obstacle = str(reason)


class _Sampling(Patch):
    """`conditional_sample`: the denoising loop."""

    def __init__(self, policy: Any, engine: FusedEngine) -> None:
        super().__init__(policy, "conditional_sample")
        self.engine = engine

    def run(
        self,
        condition_data: Tensor,
        condition_mask: Tensor,
        cond: Tensor | None = None,
        generator: torch.Generator | None = None,
        **step_arguments: Any,
    ) -> Tensor:
        call = SamplingCall(condition_data, condition_mask, cond, generator, step_arguments)
        trajectory = self.engine.trajectory
        if not trajectory.is_running or trajectory.observer is not None:
            return self.call_original(call)
        return self.engine.sample(self, call)

    def call_original(self, call: SamplingCall) -> Tensor:
        return self.original(
            call.given, call.is_given, cond=call.condition, generator=call.generator, **call.step_arguments
        )


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """No gradients, and tensors that may be written to later, also where inference mode is on."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _check_sampling(policy: Any, num_inference_steps: int) -> None:
    """Raises UnsupportedPolicyError unless the policy samples as Diffusion Policy's transformer policies do."""
    for name in ("conditional_sample", "noise_scheduler"):
        if not hasattr(policy, name):
            raise UnsupportedPolicyError(f"it has no {name}")
    parameters = tuple(inspect.signature(policy.conditional_sample).parameters)
    if parameters[: len(_ARGUMENTS)] != _ARGUMENTS:
        raise UnsupportedPolicyError(f"its conditional_sample takes {parameters}, expected {_ARGUMENTS}")
    read_sampler(copy.deepcopy(policy.noise_scheduler), num_inference_steps)
