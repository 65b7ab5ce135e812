"""The engine that runs the whole denoising loop as one static program (see `program`), compiled once and reused.

It replaces the loop around the noise scheduler, such as `policy.conditional_sample` of Diffusion Policy's transformer
policies (see `loops`). All else is the eager engine's: a loop of the user's own, observers, calls of the model outside
of sampling.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bacinfer.core.engines.base import EngineStatus, UnsupportedPolicyError
from bacinfer.core.engines.eager import EagerEngine
from bacinfer.core.engines.fused.networks import read_network
from bacinfer.core.engines.fused.program_cache import ProgramCache, run
from bacinfer.core.engines.fused.runners import check_device, fastest_on
from bacinfer.core.engines.loops import ConditionalSample, Loop, ReplacedLoop
from bacinfer.core.engines.sampling_call import SamplingCall
from bacinfer.core.engines.trajectory import COLD, WARM, Trajectory

logger = logging.getLogger("bacinfer")


class FusedEngine:
    """Runs a policy's denoising loop as one program.

    Its actions are those of the eager engine up to rounding, and carry no gradients.

    Args:
        eager: The eager engine of the same policy, blocks and schedule, not attached.
        programs: Where the programs of each phase come from.
        runner: How they run, a key of `RUNNERS`; None: the fastest one, and the eager engine where there can be no
            program.

    Raises:
        UnsupportedPolicyError: if no program can be made of the policy.
        RuntimeError: at sampling, if no program can be made of the policy any more, or its sampling turns out to
            compute something else; and as `EagerEngine`.
    """

    def __init__(self, eager: EagerEngine, programs: Sequence[ProgramCache], runner: str | None) -> None:
        self.eager = eager
        self.programs = programs
        self.runner = runner
        self.obstacle: str | None = None  # why the last call ran in the eager engine
        loop = eager.handle.loop or ConditionalSample(eager.handle.owner)
        loop.check()
        read_network(eager.handle.model, programs[COLD].blocks)
        check_device(self.name, self._device, self.precision)
        programs[COLD].check_functions(loop)
        self.loop = _Loop(loop, self)
        eager.patches.append(self.loop)

    @property
    def name(self) -> str:
        return self.runner or fastest_on(self._device)

    @property
    def precision(self) -> str | None:
        """Of the programs' products; None: the policy's own."""
        return self.programs[COLD].precision

    @property
    def _device(self) -> torch.device:
        return next(self.eager.handle.model.parameters()).device

    @property
    def trajectory(self) -> Trajectory:
        return self.eager.trajectory

    @property
    def status(self) -> EngineStatus:
        if self.obstacle is not None:
            return EngineStatus(self.eager.name, f"chosen by 'auto', as {self.obstacle}")
        reason = "" if self.runner else f"chosen by 'auto', the fastest on {self._device.type}"
        buffer_bytes = sum(programs.buffer_bytes for programs in self.programs)
        constant_bytes = sum(programs.constant_bytes for programs in self.programs)
        return EngineStatus(self.name, reason, buffer_bytes, constant_bytes, self.precision)

    def attach(self) -> None:
        self.eager.attach()

    def detach(self) -> None:
        self.eager.detach()

    def begin(self) -> None:
        self.eager.begin()

    def refresh(self) -> None:
        for programs in self.programs:
            programs.forget()

    def denoise(self, call: SamplingCall) -> Tensor:
        if self.trajectory.observer is not None:
            return self.eager.denoise(call)
        self.eager.begin(WARM)
        return self.sample(call, eagerly=self.eager.denoise)

    def sample(self, call: SamplingCall, eagerly: Callable[[SamplingCall], Tensor]) -> Tensor:
        """A trajectory of the phase that runs as a program, or eagerly if there can be none and that was left to this
        library."""
        phase = self.trajectory.phase

        def plain(call: SamplingCall) -> Tensor:
            with self.trajectory.suspended():
                return self.loop.call_original(call)

        if phase == COLD and (found := self.loop.loop.num_inference_steps) != self.trajectory.num_inference_steps:
            raise RuntimeError(
                f"the denoising loop takes {found} steps, but the plan was applied for "
                f"K = {self.trajectory.num_inference_steps}; apply a plan for K = {found}, or remove it first"
            )
        name = self.name
        # no gradients, and tensors that may be written to later, also where inference mode is on
        with self.trajectory.exclusive(), torch.inference_mode(False), torch.no_grad():
            try:
                check_device(name, call.given.device, self.precision)
                sample = run(self.programs[phase].runner(self.loop.loop, plain, call, name), call)
            except UnsupportedPolicyError as error:
                if self.runner is not None:
                    raise RuntimeError(cannot_run(self.runner, str(error), self.precision)) from error
                obstacle: str | None = str(error)
            else:
                obstacle = None
                if phase == COLD:
                    self.loop.loop.finish()
                self.trajectory.complete()
        if obstacle is not None:
            if obstacle != self.obstacle:
                log_eager(obstacle)
            sample = eagerly(call)
        self.obstacle = obstacle
        return sample


def cannot_run(engine: str, obstacle: str, precision: str | None) -> str:
    """What to tell who asked for an engine or a precision."""
    if precision is not None:
        return (
            f"precision {precision!r} is not to be had for this policy: {obstacle}. Without precision= it keeps its own"
        )
    return f"engine {engine!r} cannot run this policy: {obstacle}. engine='eager' can"


def log_eager(obstacle: str) -> None:
    """What to tell who left the choice to this library."""
    logger.warning("the engine 'eager' runs this policy, as %s", obstacle)


class _Loop(ReplacedLoop):
    """The denoising loop as a program, where the policy samples."""

    def __init__(self, loop: Loop, engine: FusedEngine) -> None:
        super().__init__(loop)
        self.engine = engine

    def sample(self, call: SamplingCall) -> Tensor:
        trajectory = self.engine.trajectory
        if not trajectory.is_running or trajectory.observer is not None or len(call.given) == 0:
            return self.call_original(call)
        return self.engine.sample(call, eagerly=self.call_original)
