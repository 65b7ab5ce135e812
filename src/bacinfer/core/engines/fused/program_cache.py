"""Programs that are compiled, each for the weights, the scheduler and the shapes that it was compiled for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bacinfer.core.blocks import Block
from bacinfer.core.engines.base import Phase, UnsupportedPolicyError
from bacinfer.core.engines.fused.constants import Constants
from bacinfer.core.engines.fused.networks import read_network
from bacinfer.core.engines.fused.policy_watch import PolicyWatch
from bacinfer.core.engines.fused.program import Program
from bacinfer.core.engines.fused.recognition import unknown_function
from bacinfer.core.engines.fused.runners import Runner, make_runner
from bacinfer.core.engines.loops import Loop
from bacinfer.core.engines.planned_scheduler import warm_steps
from bacinfer.core.engines.sampling_call import SamplingCall
from bacinfer.core.schedule import CacheSchedule

MAX_PROGRAMS = 4
NUM_PROBE_STEPS = 2
_FAR = 10.0  # beyond what normalised observations are; a comparison needs finite numbers


class ProgramCache:
    """The programs of one cached policy. Copies of it are empty.

    Args:
        blocks: The policy's residual blocks.
        phase: What the programs execute.
        known_functions_only: Whether a policy is refused whose functions are not those that programs were written for;
            otherwise its programs are compared with it over whole trajectories.
        precision: Of products, one of `PRECISIONS`; None: the policy's own, in which programs are compared in any case.
    """

    def __init__(
        self, blocks: Sequence[Block], phase: Phase, *, known_functions_only: bool, precision: str | None = None
    ) -> None:
        self.blocks = blocks
        self.phase = phase
        self.known_functions_only = known_functions_only
        self.precision = precision
        self._watch: PolicyWatch | None = None  # of the policy that the programs are for
        self._constants: dict[torch.dtype, Constants] = {}
        self._runners: OrderedDict[Any, Runner] = OrderedDict()
        self._obstacles: dict[Any, str] = {}  # why there is no runner; an error would keep its call's tensors

    def __reduce__(self) -> tuple[Any, ...]:
        make = partial(ProgramCache, known_functions_only=self.known_functions_only, precision=self.precision)
        return make, (self.blocks, self.phase)

    @property
    def buffer_bytes(self) -> int:
        """Memory of all programs' buffers."""
        return sum(runner.buffer_bytes for runner in self._runners.values())

    @property
    def constant_bytes(self) -> int:
        """Memory of weights, packed and as they are watched, and of what depends on the timesteps alone."""
        watched = 0 if self._watch is None else self._watch.num_bytes
        return watched + sum(constants.num_bytes for constants in self._constants.values())

    def check_functions(self, loop: Loop) -> str | None:
        """The function of a loop or its model that is not known, if programs may stand for such a one.

        Raises:
            UnsupportedPolicyError: they may not.
        """
        unknown = unknown_function(loop)
        if unknown is not None and self.known_functions_only:
            raise UnsupportedPolicyError(
                f"{unknown} is not a function that programs were written for (engine='fused' compares a whole "
                f"trajectory and runs it all the same)"
            )
        return unknown

    def runner(self, loop: Loop, plain: Callable[[SamplingCall], Tensor], call: SamplingCall, kind: str) -> Runner:
        """The program for a call: compiled if there is none for its shapes and the policy as it is now.

        Args:
            loop: The denoising loop.
            plain: The loop itself, computing every block.
            call: Its arguments.
            kind: How it runs, a key of `RUNNERS`.

        Raises:
            UnsupportedPolicyError: if there can be none.
        """
        if call.given.requires_grad or (call.condition is not None and call.condition.requires_grad):
            raise UnsupportedPolicyError("its inputs require gradients")
        if any(call.step_arguments.values()):
            raise UnsupportedPolicyError(f"its scheduler is called with {call.step_arguments}")
        self._forget_if_changed(loop)
        dtype = dtype_of_products(next(loop.model.parameters()))
        key = (_signature(call.given), _signature(call.condition), bool(call.is_given.any()), dtype)
        if key in self._obstacles:
            raise UnsupportedPolicyError(self._obstacles[key])
        if key not in self._runners:
            try:
                self._runners[key] = self._compile(loop, plain, call, dtype, kind)
            except UnsupportedPolicyError as error:
                self._obstacles[key] = str(error)
                raise
        self._runners.move_to_end(key)
        if len(self._runners) > MAX_PROGRAMS:
            self._runners.popitem(last=False)
        return self._runners[key]

    def forget(self) -> None:
        """The next call compiles anew."""
        self._watch = None
        self._constants.clear()
        self._runners.clear()
        self._obstacles.clear()

    def _forget_if_changed(self, loop: Loop) -> None:
        if self._watch is None or not self._watch.unchanged():
            self.forget()
            self._watch = PolicyWatch(loop)

    def _compile(
        self,
        loop: Loop,
        plain: Callable[[SamplingCall], Tensor],
        call: SamplingCall,
        dtype: torch.dtype,
        kind: str,
    ) -> Runner:
        weight = next(loop.model.parameters())
        if call.given.dtype != weight.dtype or call.given.device != weight.device:
            raise UnsupportedPolicyError(f"its trajectory is {call.given.dtype} on {call.given.device}, its model not")

        def runner_of(constants: Constants, precision: str | None, call: SamplingCall) -> Runner:
            with _no_autocast(call.given.device):
                return make_runner(kind, Program(constants, call), precision)

        unknown = self.check_functions(loop)
        if unknown is not None or dtype not in self._constants:
            K = loop.num_inference_steps
            num_steps = min(K, NUM_PROBE_STEPS * loop.calls_a_step) if unknown is None else K
            everything = CacheSchedule.every_step([block.key for block in self.blocks], num_steps)
            cold = replace(call, start=None)
            compare(
                loop,
                plain,
                cold,
                num_steps,
                dtype,
                partial(runner_of, self._prepare(loop, Phase(everything), dtype), None),
            )
        if dtype not in self._constants:
            self._constants[dtype] = self._prepare(loop, self.phase, dtype)
        return runner_of(self._constants[dtype], self.precision, call)

    def _prepare(self, loop: Loop, phase: Phase, dtype: torch.dtype) -> Constants:
        if phase.sampler is None:
            steps = loop.steps(phase.schedule.num_inference_steps)
        else:
            steps = warm_steps(loop.owner, phase)
        denoiser = read_network(loop.model, self.blocks)
        with _no_autocast(denoiser.device):
            return Constants(denoiser, phase.schedule, steps, dtype)


def compare(
    loop: Loop,
    plain: Callable[[SamplingCall], Tensor],
    call: SamplingCall,
    num_steps: int,
    dtype: torch.dtype,
    make_runner: Callable[[SamplingCall], Runner],
) -> None:
    """Raises UnsupportedPolicyError unless a program without caching makes of `call` what the policy makes of it.

    Args:
        loop, plain, call: As `ProgramCache.runner` has them.
        num_steps: Denoising steps: a few show that the program was made rightly of functions that are known; of others
            the whole trajectory is compared.
        dtype: Of the program's products.
        make_runner: The program of `num_steps` steps for a call like this one.
    """
    given = call.given.nan_to_num().clamp(-_FAR, _FAR)
    condition = None if call.condition is None else call.condition.nan_to_num().clamp(-_FAR, _FAR)
    generator = torch.Generator(given.device) if loop.takes_generator else None
    call = replace(call, given=given, condition=condition, generator=generator)
    K = loop.num_inference_steps
    try:
        loop.num_inference_steps = num_steps
        # where weights are halves, the layers around them take single precision only under autocast
        autocast = torch.autocast(given.device.type, dtype) if dtype.itemsize == 2 else nullcontext()
        with autocast, _noise_again(call), _as_written():
            expected = plain(call)
    finally:
        loop.num_inference_steps = K
    with _noise_again(call), _as_written():
        found = run(make_runner(call), call)
    difference = (found - expected).abs().max().item()
    bound = torch.finfo(dtype).eps ** 0.5 * max(1.0, expected.abs().max().item())
    if not difference <= bound:
        raise UnsupportedPolicyError(
            f"its sampling computes something else than the program made of it: after {num_steps} steps they differ by "
            f"{difference:.2g}, where {bound:.2g} was expected at most"
        )


@contextmanager
def _noise_again(call: SamplingCall) -> Iterator[None]:
    """Inside, noise is the same each time, from the call's generator or the global one, which is left alone."""
    if call.generator is not None:
        call.generator.manual_seed(0)
    device = call.given.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextmanager
def _as_written() -> Iterator[None]:
    """Without PyTorch's shortcuts on CUDA: TensorFloat-32, and encoder layers' fast path, which approximates GELU."""
    fast, precision = torch.backends.mha.get_fastpath_enabled(), torch.get_float32_matmul_precision()
    torch.backends.mha.set_fastpath_enabled(False)
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.set_float32_matmul_precision(precision)


def run(runner: Runner, call: SamplingCall) -> Tensor:
    """What a program makes of a call; its dtypes are its own, whatever autocast says."""
    with _no_autocast(call.given.device):
        return runner.sample(call)


def _no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if _autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)


def dtype_of_products(weights: Tensor) -> torch.dtype:
    """What matrix products run in: autocast's dtype where it is on, otherwise that of the weights."""
    return _autocast_dtype(weights.device) or weights.dtype


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """None where autocast is off."""
    if hasattr(torch, "get_autocast_dtype"):  # PyTorch 2.4
        return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    if device.type == "cpu":
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None


def _signature(tensor: Tensor | None) -> Any:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device)
