"""Programs that are compiled, each for the weights, the scheduler and the shapes that it was compiled for."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from bacinfer.core.blocks import Block
from bacinfer.core.engines.base import UnsupportedPolicyError
from bacinfer.core.engines.fused.buffers import SamplingCall
from bacinfer.core.engines.fused.denoiser import read_denoiser
from bacinfer.core.engines.fused.program import Constants, Program
from bacinfer.core.engines.fused.sampler import read_sampler
from bacinfer.core.engines.fused.weights import WeightWatch
from bacinfer.core.schedule import CacheSchedule

MAX_PROGRAMS = 4
NUM_PROBE_STEPS = 2


class Runner(Protocol):
    """A program in the form in which an engine runs it; `buffer_bytes` is what its buffers take."""

    @property
    def buffer_bytes(self) -> int: ...

    def sample(self, call: SamplingCall) -> Tensor:
        """The denoised trajectory [B, T, A], which is the caller's own."""
        ...


class ProgramCache:
    """The programs of one cached policy. Copies of it are empty."""

    def __init__(
        self, blocks: Sequence[Block], schedule: CacheSchedule, make_runner: Callable[[Program], Runner]
    ) -> None:
        self.blocks = blocks
        self.schedule = schedule
        self.make_runner = make_runner
        self._scheduler: Any = None  # class and configuration that the programs are for
        self._weights: WeightWatch | None = None  # likewise
        self._constants: dict[torch.dtype, Constants] = {}
        self._runners: OrderedDict[Any, Runner | str] = OrderedDict()  # or why there is none

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(ProgramCache(self.blocks, self.schedule, self.make_runner)))

    @property
    def buffer_bytes(self) -> int:
        """Memory of all programs' buffers."""
        return sum(runner.buffer_bytes for runner in self._runners.values() if not isinstance(runner, str))

    @property
    def constant_bytes(self) -> int:
        """Memory of packed weights, and of what depends on the timesteps alone."""
        return sum(constants.num_bytes for constants in self._constants.values())

    def runner(self, policy: Any, plain: Callable[[SamplingCall], Tensor], call: SamplingCall) -> Runner:
        """The program for a call: compiled if there is none for its shapes and the policy as it is now.

        Args:
            policy: The policy.
            plain: Its own `conditional_sample`, computing every block.
            call: Its arguments.

        Raises:
            UnsupportedPolicyError: if there can be none.
        """
        if call.given.requires_grad or (call.condition is not None and call.condition.requires_grad):
            raise UnsupportedPolicyError("its inputs require gradients")
        if any(call.step_arguments.values()):
            raise UnsupportedPolicyError(f"its scheduler is called with {call.step_arguments}")
        self._forget_if_changed(policy)
        dtype = dtype_of_products(policy.model)
        key = (_signature(call.given), _signature(call.condition), bool(call.is_given.any()), dtype)
        if key not in self._runners:
            try:
                self._runners[key] = self._compile(policy, plain, call, dtype)
            except UnsupportedPolicyError as error:
                self._runners[key] = str(error)
        self._runners.move_to_end(key)
        if len(self._runners) > MAX_PROGRAMS:
            self._runners.popitem(last=False)
        found = self._runners[key]
        if isinstance(found, str):
            raise UnsupportedPolicyError(found)
        return found

    def _forget_if_changed(self, policy: Any) -> None:
        scheduler = (type(policy.noise_scheduler), dict(policy.noise_scheduler.config))
        if self._weights is None or scheduler != self._scheduler or not self._weights.unchanged(policy.model):
            self._scheduler, self._weights = scheduler, WeightWatch(policy.model)
            self._constants.clear()
            self._runners.clear()

    def _compile(
        self, policy: Any, plain: Callable[[SamplingCall], Tensor], call: SamplingCall, dtype: torch.dtype
    ) -> Runner:
        if call.given.dtype != policy.model.pos_emb.dtype or call.given.device != policy.model.pos_emb.device:
            raise UnsupportedPolicyError(f"its trajectory is {call.given.dtype} on {call.given.device}, its model not")
        if dtype not in self._constants:
            self._compare_with(policy, plain, call, dtype)
            self._constants[dtype] = self._prepare(policy, self.schedule, dtype)
        return self._runner_of(self._constants[dtype], call)

    def _runner_of(self, constants: Constants, call: SamplingCall) -> Runner:
        with _no_autocast(call.given.device):
            return self.make_runner(Program(constants, call))

    def _prepare(self, policy: Any, schedule: CacheSchedule, dtype: torch.dtype) -> Constants:
        sampler = read_sampler(copy.deepcopy(policy.noise_scheduler), schedule.num_inference_steps)
        denoiser = read_denoiser(policy.model, self.blocks)
        with _no_autocast(policy.model.pos_emb.device):
            return Constants(denoiser, schedule, sampler, dtype)

    def _compare_with(
        self, policy: Any, plain: Callable[[SamplingCall], Tensor], call: SamplingCall, dtype: torch.dtype
    ) -> None:
        """Raises UnsupportedPolicyError unless a program without caching makes of `call` what the policy makes of it.

        Structure alone does not tell what a forward or a sampling loop computes; a few denoising steps do.
        """
        K = policy.num_inference_steps
        steps = min(K, NUM_PROBE_STEPS)
        everything = CacheSchedule.every_step([block.key for block in self.blocks], steps)
        generator = torch.Generator(call.given.device)
        call = replace(call, generator=generator.manual_seed(0))
        try:
            policy.num_inference_steps = steps
            # where weights are halves, the layers around them take single precision only under autocast
            with torch.autocast(call.given.device.type, dtype, enabled=dtype != torch.float32):
                expected = plain(call)
        finally:
            policy.num_inference_steps = K
        generator.manual_seed(0)
        found = run(self._runner_of(self._prepare(policy, everything, dtype), call), call)
        difference = (found - expected).abs().max().item()
        bound = torch.finfo(dtype).eps ** 0.5 * max(1.0, expected.abs().max().item())
        if not difference <= bound:
            raise UnsupportedPolicyError(
                f"its sampling computes something else than the program made of it: after {steps} steps they differ "
                f"by {difference:.2g}, where {bound:.2g} was expected at most"
            )


def run(runner: Runner, call: SamplingCall) -> Tensor:
    """What a program makes of a call; its dtypes are its own, whatever autocast says."""
    with _no_autocast(call.given.device):
        return runner.sample(call)


def _no_autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)


def dtype_of_products(model: Any) -> torch.dtype:
    """What matrix products run in: autocast's dtype where it is on, otherwise that of the weights."""
    weights: Tensor = model.pos_emb
    device = weights.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weights.dtype


def _signature(tensor: Tensor | None) -> Any:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device)
