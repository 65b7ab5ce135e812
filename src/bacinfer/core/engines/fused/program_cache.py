"""Programs that are compiled, each for the weights, the scheduler and the shapes that it was compiled for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bacinfer.core.blocks import Block
from bacinfer.core.engines.base import Phase, UnsupportedPolicyError
from bacinfer.core.engines.fused.constants import Constants
from bacinfer.core.engines.fused.denoiser import read_denoiser
from bacinfer.core.engines.fused.policy_watch import PolicyWatch
from bacinfer.core.engines.fused.program import Program
from bacinfer.core.engines.fused.recognition import unknown_function
from bacinfer.core.engines.fused.runners import RUNNERS, Runner
from bacinfer.core.engines.planned_scheduler import steps_of, warm_steps
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
    """

    def __init__(self, blocks: Sequence[Block], phase: Phase, *, known_functions_only: bool) -> None:
        self.blocks = blocks
        self.phase = phase
        self.known_functions_only = known_functions_only
        self._watch: PolicyWatch | None = None  # of the policy that the programs are for
        self._constants: dict[torch.dtype, Constants] = {}
        self._runners: OrderedDict[Any, Runner] = OrderedDict()
        self._obstacles: dict[Any, str] = {}  # why there is no runner; an error would keep its call's tensors

    def __reduce__(self) -> tuple[Any, ...]:
        make = partial(ProgramCache, known_functions_only=self.known_functions_only)
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

    def check_functions(self, policy: Any) -> str | None:
        """The function of a policy that is not known, if programs may stand for such a one.

        Raises:
            UnsupportedPolicyError: they may not.
        """
        unknown = unknown_function(policy)
        if unknown is not None and self.known_functions_only:
            raise UnsupportedPolicyError(
                f"{unknown} is not a function that programs were written for (engine='fused' compares a whole "
                f"trajectory and runs it all the same)"
            )
        return unknown

    def runner(self, policy: Any, plain: Callable[[SamplingCall], Tensor], call: SamplingCall, kind: str) -> Runner:
        """The program for a call: compiled if there is none for its shapes and the policy as it is now.

        Args:
            policy: The policy.
            plain: Its own `conditional_sample`, computing every block.
            call: Its arguments.
            kind: How it runs, a key of `RUNNERS`.

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
        if key in self._obstacles:
            raise UnsupportedPolicyError(self._obstacles[key])
        if key not in self._runners:
            try:
                self._runners[key] = self._compile(policy, plain, call, dtype, RUNNERS[kind])
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

    def _forget_if_changed(self, policy: Any) -> None:
        if self._watch is None or not self._watch.unchanged(policy):
            self.forget()
            self._watch = PolicyWatch(policy)

    def _compile(
        self,
        policy: Any,
        plain: Callable[[SamplingCall], Tensor],
        call: SamplingCall,
        dtype: torch.dtype,
        make_runner: Callable[[Program], Runner],
    ) -> Runner:
        if call.given.dtype != policy.model.pos_emb.dtype or call.given.device != policy.model.pos_emb.device:
            raise UnsupportedPolicyError(f"its trajectory is {call.given.dtype} on {call.given.device}, its model not")

        def runner_of(constants: Constants, call: SamplingCall) -> Runner:
            with _no_autocast(call.given.device):
                return make_runner(Program(constants, call))

        unknown = self.check_functions(policy)
        if unknown is not None or dtype not in self._constants:
            K = policy.num_inference_steps
            num_steps = min(K, NUM_PROBE_STEPS) if unknown is None else K
            everything = CacheSchedule.every_step([block.key for block in self.blocks], num_steps)
            cold = replace(call, start=None)
            compare(
                policy,
                plain,
                cold,
                num_steps,
                dtype,
                partial(runner_of, self._prepare(policy, Phase(everything), dtype)),
            )
        if dtype not in self._constants:
            self._constants[dtype] = self._prepare(policy, self.phase, dtype)
        return runner_of(self._constants[dtype], call)

    def _prepare(self, policy: Any, phase: Phase, dtype: torch.dtype) -> Constants:
        if phase.sampler is None:
            steps = steps_of(policy.noise_scheduler, phase.schedule.num_inference_steps)
        else:
            steps = warm_steps(policy, phase)
        denoiser = read_denoiser(policy.model, self.blocks)
        with _no_autocast(policy.model.pos_emb.device):
            return Constants(denoiser, phase.schedule, steps, dtype)


def compare(
    policy: Any,
    plain: Callable[[SamplingCall], Tensor],
    call: SamplingCall,
    num_steps: int,
    dtype: torch.dtype,
    make_runner: Callable[[SamplingCall], Runner],
) -> None:
    """Raises UnsupportedPolicyError unless a program without caching makes of `call` what the policy makes of it.

    Args:
        policy, plain, call: As `ProgramCache.runner` has them.
        num_steps: Denoising steps: a few show that the program was made rightly of functions that are known; of others
            the whole trajectory is compared.
        dtype: Of the program's products.
        make_runner: The program of `num_steps` steps for a call like this one.
    """
    given = call.given.nan_to_num().clamp(-_FAR, _FAR)
    condition = None if call.condition is None else call.condition.nan_to_num().clamp(-_FAR, _FAR)
    generator = torch.Generator(call.given.device)
    call = replace(call, given=given, condition=condition, generator=generator.manual_seed(0))
    K = policy.num_inference_steps
    try:
        policy.num_inference_steps = num_steps
        # where weights are halves, the layers around them take single precision only under autocast
        autocast = torch.autocast(call.given.device.type, dtype) if dtype.itemsize == 2 else nullcontext()
        # a loop that is not known might draw from the global generator
        with autocast, torch.random.fork_rng(_cuda_devices(call.given.device)):
            expected = plain(call)
    finally:
        policy.num_inference_steps = K
    generator.manual_seed(0)
    difference = (run(make_runner(call), call) - expected).abs().max().item()
    bound = torch.finfo(dtype).eps ** 0.5 * max(1.0, expected.abs().max().item())
    if not difference <= bound:
        raise UnsupportedPolicyError(
            f"its sampling computes something else than the program made of it: after {num_steps} steps they differ by "
            f"{difference:.2g}, where {bound:.2g} was expected at most"
        )


def _cuda_devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


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
    if hasattr(torch, "get_autocast_dtype"):  # PyTorch 2.4
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weights.dtype
    if device == "cpu":
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else weights.dtype
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else weights.dtype


def _signature(tensor: Tensor | None) -> Any:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device)
