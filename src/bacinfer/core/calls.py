"""Calling a policy, or its handle: with noise from a seed, and timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from bacinfer.core.engines.base import APPLIED
from bacinfer.core.handle import PolicyHandle
from bacinfer.core.warm_start import Memory

_Result = TypeVar("_Result")


class NoiseStream:
    """Inside ``with``, torch's generators (CPU and the policy's device) are those of this stream; restored after.

    A stream starts at `seed`, and each ``with`` goes on where the last one ended.
    """

    def __init__(self, policy: Any, seed: int) -> None:
        self._device = policy_device(policy)
        self._seed = seed
        self._states: list[Tensor] = []
        self._outside: list[Tensor] = []

    def __enter__(self) -> None:
        self._outside = self._get()
        if self._states:
            self._set(self._states)
        else:
            torch.manual_seed(self._seed)

    def __exit__(self, *_: object) -> None:
        self._states = self._get()
        self._set(self._outside)

    def _get(self) -> list[Tensor]:
        cuda = [torch.cuda.get_rng_state(self._device)] if self._device.type == "cuda" else []
        return [torch.get_rng_state(), *cuda]

    def _set(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(states[1], self._device)


class CallStream(NoiseStream):
    """One of several streams of calls to a policy that take turns: with noise, and with what its plan keeps between
    calls, of its own."""

    def __init__(self, policy: Any, seed: int) -> None:
        super().__init__(policy, seed)
        self._policy = policy
        self._memory = Memory()

    def __enter__(self) -> None:
        super().__enter__()
        self._switch_memory()

    def __exit__(self, *error: object) -> None:
        self._switch_memory()
        super().__exit__(*error)

    def _switch_memory(self) -> None:
        applied = vars(owner_of(self._policy)).get(APPLIED)
        if applied is not None and applied.warm_loop is not None:
            applied.warm_loop.memory, self._memory = self._memory, applied.warm_loop.memory


def seeded_noise(policy: Any, seed: int) -> AbstractContextManager[None]:
    """Inside, torch's generators (CPU and the policy's device) start at `seed`; restored after."""
    return NoiseStream(policy, seed)


def owner_of(policy: Any) -> Any:
    """The object that samples: the policy itself, or what its handle names."""
    return policy.owner if isinstance(policy, PolicyHandle) else policy


def policy_device(policy: Any) -> torch.device:
    """The device that a policy's model lies on."""
    return next(policy.model.parameters()).device


def sample(policy: Any, observation: Any) -> Any:
    """What a policy, or the method that a handle names, returns for an observation."""
    return policy(observation) if isinstance(policy, PolicyHandle) else policy.predict_action(observation)


def timed_call(policy: Any, observation: Any) -> tuple[Any, float]:
    """What `sample` returns without gradients, and its wall time in seconds with the device's work done."""
    with torch.no_grad():
        return timed(partial(sample, policy, observation), policy_device(policy))


def timed(call: Callable[[], _Result], device: torch.device) -> tuple[_Result, float]:
    """What a call returns, and its wall time in seconds with the device's work done."""
    _wait(device)
    start = time.perf_counter()
    result = call()
    _wait(device)
    return result, time.perf_counter() - start


def _wait(device: torch.device) -> None:
    """CUDA calls return before their work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
