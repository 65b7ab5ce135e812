"""Policy -> what reusing a residual does to the final action, to first order.

A block that is computed at step a and reused until step e-1 adds r(a) - r(t) too much to the residual stream at each of
these steps t. To first order that changes the final action by the sum over t of J_t (r(a) - r(t)), with J_t the
derivative of the action with respect to the block's residual at step t, through the rest of the denoising loop. The
expected square of that change comes from few vector-Jacobian products: E |J d|^2 = E (v^T J d)^2 for vectors v of
random signs (Hutchinson, 1989).

All of it holds along one trajectory: that of the plain policy, or, nearer to what is to be judged, that of a policy
which reuses residuals as a schedule says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from bacinfer.analysis.residuals import DEFAULT_DEMO, DEFAULT_SEED, call_seed
from bacinfer.analysis.similarity import Array, check_residuals
from bacinfer.core.blocks import Block, find_blocks
from bacinfer.core.calls import sample, seeded_noise
from bacinfer.core.engines.observing import observe_residuals
from bacinfer.core.handle import PolicyHandle
from bacinfer.core.schedule import CacheSchedule
from bacinfer.measurement.action_error import actions_of

NUM_PROBES = 4
"""Vectors of random signs for each observation."""


@dataclass(frozen=True)
class Linearisation:
    """One call of a policy, and how its actions depend on its residuals.

    Attributes:
        residuals: Block key to its residuals [K, ...], computed at every step.
        gradients: Block key to the gradients [P, K, ...] of v · actions, one for each probe v, with respect to what the
            block adds at each step.
        probes: The vectors v [P, B, ...] of random signs, shaped like the actions.
    """

    residuals: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    probes: Tensor


def linearise(
    policy: Any, obs: Any, seed: int, num_probes: int = NUM_PROBES, schedule: CacheSchedule | None = None
) -> Linearisation:
    """Samples an action of a plain policy, with noise from `seed`, and differentiates it.

    With a schedule, residuals are reused as it says: the action is that of the policy with this cache.

    The loop's graph holds what goes between blocks; what is within a block is computed again when it is differentiated.
    So memory is that of a few residuals for each block and step.

    Raises:
        ValueError: the policy's loop cannot be differentiated, or a residual is not finite.
    """
    runs = [_BlockRun(block, schedule) for block in find_blocks(PolicyHandle.of(policy).model)]
    blocks = [replace(run.block, spec=replace(run.block.spec, residual=run.residual)) for run in runs]
    with torch.enable_grad(), seeded_noise(policy, seed), observe_residuals(policy, lambda *_: None, blocks):
        actions = actions_of(policy, sample(policy, obs))
    residuals = {run.block.key: torch.stack(run.computed) for run in runs}
    for block, of_block in residuals.items():
        check_residuals(of_block, block)
    probes = _random_signs((num_probes, *actions.shape), seed).to(actions)
    changes = {run.block.key: run.changes for run in runs}
    products = [_gradients(actions, changes, probe) for probe in probes]
    return Linearisation(residuals, {block: torch.stack([g[block] for g in products]) for block in changes}, probes)


def holding_costs(
    policy: Any,
    observations: Iterable[Any],
    noise_seed: int = DEFAULT_SEED,
    schedule: CacheSchedule | None = None,
) -> dict[str, Array]:
    """What it costs to hold the residuals of a plain policy, averaged over observations.

    Args:
        policy: A plain policy.
        observations: What it samples at, the index-th with the noise of the index-th policy call of a demo.
        schedule: That of the trajectories along which costs are first-order changes; None: those of the plain policy.

    Returns:
        Block key to costs [K, K+1]: entry [a, e] is the mean squared change of the normalised actions, to first order,
        that comes from reusing step a's residual until step e-1; inf where e <= a.

    Raises:
        ValueError: there are no observations, or as `linearise`.
    """
    total: dict[str, Array] = {}
    count = 0
    seen = tqdm(observations, desc="differentiating the policy", unit="observation")
    for index, obs in enumerate(seen):
        found = linearise(policy, obs, call_seed(noise_seed, DEFAULT_DEMO, index), schedule=schedule)
        count += 1
        for block, costs in segment_costs(found).items():
            total[block] = total.get(block, 0.0) + costs
    if not count:
        raise ValueError("there are no observations to find a plan at: give at least one")
    return {block: costs / count for block, costs in total.items()}


def segment_costs(found: Linearisation) -> dict[str, Array]:
    """The costs of `holding_costs` at one observation."""
    return {
        block: _segment_costs(residuals, found.gradients[block], found.probes[0].numel())
        for block, residuals in found.residuals.items()
    }


def _segment_costs(residuals: Tensor, gradients: Tensor, num_actions: int) -> Array:
    rows = residuals.flatten(start_dim=1).cpu().double()  # [K, F]
    rows = rows - rows.mean(dim=0)  # changes no difference, keeps digits
    slopes = gradients.flatten(start_dim=2).cpu().double()  # [P, K, F]
    worth = torch.einsum("af,ptf->pat", rows, slopes)
    changes = worth - worth.diagonal(dim1=1, dim2=2)[:, None, :]  # [p, a, t]: v^T J_t (r(a) - r(t))
    K = len(rows)
    costs = np.full((K, K + 1), np.inf)
    squares = changes.triu().cumsum(dim=2).square().mean(dim=0) / num_actions
    above = np.triu_indices(K)
    costs[:, 1:][above] = squares.numpy()[above]
    return costs


class _BlockRun:
    """A block during one sampling, of which a backward pass keeps the input alone, and computes the rest again.

    Attributes:
        computed: Its residual at each step, also where a stored one is used.
        changes: What is added to the one that is used: zeros, to differentiate with respect to.
    """

    def __init__(self, block: Block, schedule: CacheSchedule | None) -> None:
        self.block = block
        self.computed: list[Tensor] = []
        self.changes: list[Tensor] = []
        self._updates = None if schedule is None else schedule.update_mask(block.key)

    def residual(self, *args: Any, **kwargs: Any) -> Tensor:
        compute = partial(checkpoint, self.block.spec.residual, use_reentrant=False, preserve_rng_state=False)
        residual: Tensor = compute(*args, **kwargs)
        if self._updates is None or self._updates[len(self.computed)]:
            self._stored = residual
        self.computed.append(residual.detach())
        self.changes.append(torch.zeros_like(residual, requires_grad=True))
        return self._stored + self.changes[-1]


def _gradients(actions: Tensor, changes: Mapping[str, list[Tensor]], probe: Tensor) -> dict[str, Tensor]:
    """Block key to the gradients [K, ...] of probe · actions with respect to changes of its residuals."""
    residuals = [change for steps in changes.values() for change in steps]
    found: tuple[Tensor | None, ...] = (None,)
    if actions.requires_grad:
        found = torch.autograd.grad(actions, residuals, probe, retain_graph=True, allow_unused=True)
    gradients = [gradient for gradient in found if gradient is not None]
    if len(gradients) < len(residuals):
        raise ValueError(
            "the denoising loop of this policy cannot be differentiated: no gradient goes from its actions to the "
            "residuals of all its steps, as under torch.no_grad() or after detach(). Sensitivities need one, the "
            "schedules of find_plan do not"
        )
    remaining = iter(gradients)
    return {block: torch.stack([next(remaining) for _ in steps]) for block, steps in changes.items()}


def _random_signs(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
