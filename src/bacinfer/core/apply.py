"""Applying a sampling plan to a policy, in place; taking it back; and seeing what is done."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from bacinfer.core.blocks import Block, find_blocks, num_weights
from bacinfer.core.engines import AUTO, Engine, choose_engine
from bacinfer.core.engines.base import APPLIED, Phase
from bacinfer.core.engines.planned_scheduler import SwitchedSampler
from bacinfer.core.engines.warm_loop import WarmLoop
from bacinfer.core.handle import Policy, PolicyHandle
from bacinfer.core.patching import remove_patches
from bacinfer.core.plan import Fingerprint, SamplingPlan
from bacinfer.core.schedule import CacheSchedule
from bacinfer.core.summary import BlockCounts, CacheSummary, other_weights

_Policy = TypeVar("_Policy", bound=Policy | PolicyHandle)


@dataclass
class Applied:
    """What a policy carries while something is applied to it: the one object that all of it lives in."""

    mode: str
    plan: SamplingPlan
    phases: tuple[Phase, ...]
    plain_num_steps: int  # K of the policy without the plan
    blocks: list[Block]
    engine: Engine
    warnings: tuple[str, ...]
    sampler: SwitchedSampler | None = None
    warm_loop: WarmLoop | None = None

    def install(self, owner: Any) -> None:
        if self.sampler is not None:
            self.sampler.install()
        self.engine.attach()
        if self.warm_loop is not None:
            self.warm_loop.install()
        setattr(owner, APPLIED, self)
        owner.reset_cache = self.engine.begin

    def uninstall(self, owner: Any) -> None:
        if self.sampler is not None:
            self.sampler.check()
        if self.warm_loop is not None:
            remove_patches([self.warm_loop])
        self.engine.detach()
        if self.sampler is not None:
            self.sampler.remove()
        delattr(owner, APPLIED)
        del owner.reset_cache


def apply(
    policy: _Policy,
    plan: SamplingPlan | CacheSchedule | str | Path,
    *,
    engine: str = AUTO,
    precision: str | None = None,
    for_this_policy: bool = True,
    stateful: bool = False,
) -> _Policy:
    """Makes `policy` sample by `plan` from the next call on, in place; returns it.

    A policy that has a plan already gets the new one instead. Everything else about it stays as it was.

    Args:
        policy: A policy, or its handle.
        plan: The plan, a schedule of its cache alone, or the path of a file that holds one of them. A plan without any
            part runs every block at every step: exactly the policy's own actions, as fast as the engine can.
        engine: What runs it: ``eager`` replaces the forwards of the layers of any policy; ``onednn`` does, too,
            with oneDNN's products; ``fused`` runs the whole denoising loop of policies that it knows as one program,
            ``cuda_graph`` as one CUDA graph; ``auto`` is the fastest that can, of all but ``onednn``.
        precision: ``bf16`` rounds the weights of self-attention and feed-forward blocks, and what they are multiplied
            with, to bfloat16, and adds in single precision; only in compiled code on a CPU and in the kernels of
            `cuda_graph`. ``int8`` rounds them to bytes, with a scale for each output of a weight and each row that it
            meets; only in compiled code. None: the policy's own.
        for_this_policy: Whether a plan that was made for another policy, other weights included, is refused.
        stateful: Whether the plan may start a call from the last one's trajectory (`SamplingPlan.warm_start`). Then
            this policy must serve one stream of calls, one robot or one batch of environments in a fixed order, and
            ``policy.reset()`` be called when an episode starts.

    Raises:
        TypeError: the policy lacks a part, or `plan` is something else.
        ValueError: the plan is for another policy, K or blocks, or keeps state that was not asked for; the engine or
            the precision is unknown or cannot run the policy; or the file holds no plan.
        FileNotFoundError: there is no such file.
    """
    plan = _read(plan)
    if plan.warm_start is not None and isinstance(policy, PolicyHandle):
        raise ValueError(
            "a warm start replaces the denoising loop of a policy that it knows, and is forgotten by policy.reset(); a "
            "handle names neither: use a plan without a warm start"
        )
    if plan.warm_start is not None and not stateful:
        raise ValueError(
            "the plan starts a call from the last one's actions, which is right only where this policy object serves "
            "one stream of calls and policy.reset() is called at the start of every episode; if so, pass stateful=True"
        )
    apply_plan(policy, plan, mode="plan", engine=engine, precision=precision, for_this_policy=for_this_policy)
    return policy


def apply_plan(
    policy: Any,
    plan: SamplingPlan,
    *,
    mode: str,
    engine: str,
    precision: str | None = None,
    for_this_policy: bool = True,
) -> None:
    """Runs a plan; `mode` is what a summary calls it. Where it does not fit, the policy keeps what it had.

    Raises as `apply`.
    """
    before = applied_to(policy)
    switch(policy, None)
    try:
        if for_this_policy and plan.made_for is not None:
            _check_made_for(plan.made_for, policy)
        applied = _make(policy, plan, mode, engine, precision)
    except BaseException:
        switch(policy, before)
        raise
    switch(policy, applied)
    for message in applied.warnings:
        warnings.warn(message, stacklevel=4)


def _check_made_for(made_for: Fingerprint, policy: Any) -> None:
    differences = made_for.differences(Fingerprint.of(policy))
    if differences:
        raise ValueError(
            f"the plan was made for another policy ({'; '.join(differences)}); find one for this policy, or pass "
            f"for_this_policy=False if it is meant"
        )


def _make(policy: Any, plan: SamplingPlan, mode: str, engine: str, precision: str | None) -> Applied:
    """What runs a plan on a plain policy."""
    plain_num_steps = PolicyHandle.of(policy).num_inference_steps
    sampler = None if plan.sampler is None else SwitchedSampler(policy, plan.sampler)
    with nullcontext(policy) if sampler is None else sampler.installed() as policy:
        handle = PolicyHandle.of(policy)
        blocks = find_blocks(handle.model)
        keys, K = [block.key for block in blocks], handle.num_inference_steps
        cold = Phase(plan.cache or CacheSchedule.every_step(keys, K))
        messages = list(_check_fit(cold.schedule, keys, K))
        phases: tuple[Phase, ...] = (cold,)
        if (warm_start := plan.warm_start) is not None:
            num_steps = warm_start.sampler.num_steps
            warm = Phase(warm_start.cache or CacheSchedule.every_step(keys, num_steps), warm_start.sampler)
            messages += [f"warm start: {text}" for text in _check_fit(warm.schedule, keys, num_steps)]
            phases = (cold, warm)
        chosen = choose_engine(engine, policy, blocks, phases, precision)
        warm_loop = None if warm_start is None else WarmLoop(policy, warm_start, chosen)
    return Applied(mode, plan, phases, plain_num_steps, blocks, chosen, tuple(messages), sampler, warm_loop)


def remove(policy: _Policy) -> _Policy:
    """Restores `policy` exactly, in place; returns it. A policy to which nothing is applied stays as it is.

    Args:
        policy: A policy, or its handle.

    Raises:
        TypeError: the policy lacks a part.
        RuntimeError: a method that was replaced was replaced again since; nothing is changed then.
    """
    switch(policy, None)
    return policy


def refresh(policy: _Policy) -> _Policy:
    """Has `policy` read its weights anew at the next call; returns it.

    Needed after writes that PyTorch cannot see, through ``tensor.data`` or NumPy, to parts of a weight: a fused engine
    finds those by itself, but only within 64 calls.

    Args:
        policy: A policy, or its handle.

    Raises:
        TypeError: the policy lacks a part.
    """
    applied = applied_to(policy)
    if applied is not None:
        applied.engine.refresh()
    return policy


def summary(policy: Policy | PolicyHandle) -> CacheSummary:
    """Mode, engine, K, updates and reuses of each block, the share of FLOPs that is left, warnings given.

    Args:
        policy: A policy, or its handle.

    Raises:
        TypeError: the policy lacks a part.
        ValueError: its model has no layer of a registered class.
    """
    handle, applied = PolicyHandle.of(policy), applied_to(policy)
    if applied is None:
        blocks, K, schedule = find_blocks(handle.model), handle.num_inference_steps, None
        plain_K = K
    else:
        blocks, schedule = applied.blocks, applied.phases[-1].schedule
        K, plain_K = schedule.num_inference_steps, applied.plain_num_steps
    status = applied.engine.status if applied else None
    updates = {block.key: schedule.num_updates(block.key) if schedule else K for block in blocks}
    return CacheSummary(
        mode=applied.mode if applied else "original",
        engine=status.name if status else None,
        precision=status.precision if status else None,
        engine_reason=status.reason if status else "",
        buffer_bytes=status.buffer_bytes if status else 0,
        constant_bytes=status.constant_bytes if status else 0,
        num_inference_steps=K,
        blocks={key: BlockCounts(n, K - n) for key, n in updates.items()},
        flops_fraction=_flops_fraction(handle.model, blocks, updates, K) * K / plain_K,
        model_weights=num_weights(handle.model),
        other_weights=other_weights(handle.owner, handle.model),
        warnings=applied.warnings if applied else (),
        schedule=schedule,
        sampler=applied.plan.sampler if applied else None,
        warm_start=applied.plan.warm_start if applied else None,
    )


def prepared(
    policy: Any, plans: Mapping[str, Any], *, engine: str = AUTO, precision: str | None = None, stateful: bool = False
) -> dict[str, Applied]:
    """Plans by their names to what runs them, for `switch`; the policy is left plain. See `apply`, also for errors."""
    found = {}
    for name, plan in plans.items():
        apply(policy, plan, engine=engine, precision=precision, stateful=stateful)
        applied = applied_to(policy)
        assert applied is not None
        found[name] = applied
    switch(policy, None)
    return found


def applied_to(policy: Any) -> Applied | None:
    """What is applied to a policy."""
    return vars(PolicyHandle.of(policy).owner).get(APPLIED)


def switch(policy: Any, new: Applied | None) -> None:
    """Applies what was applied to the policy before, with what its engine has made since, instead of what is now."""
    owner, old = PolicyHandle.of(policy).owner, applied_to(policy)
    if old is not None:
        old.uninstall(owner)
    if new is not None:
        new.install(owner)


@contextmanager
def left_as_found(policy: Any) -> Iterator[None]:
    """Inside, a policy is plain, and plans may be applied to it; afterwards it has what it had before."""
    before = applied_to(policy)
    switch(policy, None)
    try:
        yield
    finally:
        switch(policy, before)


def _read(plan: SamplingPlan | CacheSchedule | str | Path) -> SamplingPlan:
    if isinstance(plan, (str, Path)):
        return SamplingPlan.load(plan)
    if isinstance(plan, CacheSchedule):
        return SamplingPlan(plan)
    if isinstance(plan, SamplingPlan):
        return plan
    raise TypeError(f"expected a SamplingPlan, a CacheSchedule or the path of a file, got {type(plan).__name__}")


def _check_fit(schedule: CacheSchedule, keys: Sequence[str], num_inference_steps: int) -> tuple[str, ...]:
    """Raises ValueError if the schedule is another policy's; returns what to warn of."""
    if schedule.num_inference_steps != num_inference_steps:
        raise ValueError(
            f"the schedule was made for K = {schedule.num_inference_steps} denoising steps, the policy has "
            f"num_inference_steps = {num_inference_steps}"
        )
    unknown = [key for key in schedule.update_steps if key not in keys]
    if unknown:
        raise ValueError(f"the schedule has blocks that the policy lacks: {unknown}; the policy has {list(keys)}")
    missing = [key for key in keys if key not in schedule.update_steps]
    if missing:
        return (f"no update steps for {', '.join(missing)}: computed at every step",)
    return ()


def _flops_fraction(model: nn.Module, blocks: Sequence[Block], updates: Mapping[str, int], K: int) -> float:
    """Multiplications with weights that are left of K steps, as a share of the model's without a cache."""
    saved = sum((K - updates[block.key]) * block.num_weights for block in blocks)
    return 1 - saved / (K * num_weights(model))
