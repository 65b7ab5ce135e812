"""LeRobot's policies: a plan on any that is supported, in one line (``import bacinfer.lerobot``).

The adapter is chosen by the policy's class. It hooks the denoising loop itself, so that `select_action`,
`predict_action_chunk` and whatever calls them profit alike. The package ``lerobot`` is imported by its policies alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import bacinfer.analysis.find_plan
import bacinfer.core.apply
import bacinfer.measurement.plans
from bacinfer.core.engines import AUTO
from bacinfer.core.plan import SamplingPlan
from bacinfer.core.schedule import CacheSchedule
from bacinfer.core.summary import CacheSummary
from bacinfer.lerobot.registry import handle
from bacinfer.measurement.plans import Measurements

if TYPE_CHECKING:
    from lerobot.policies.pretrained import PreTrainedPolicy

__all__ = ["apply", "find_plan", "handle", "measure", "remove", "summary"]

_Policy = TypeVar("_Policy", bound="PreTrainedPolicy")


def apply(
    policy: _Policy,
    plan: SamplingPlan | CacheSchedule | str | Path,
    *,
    engine: str = AUTO,
    precision: str | None = None,
    for_this_policy: bool = True,
) -> _Policy:
    """Makes a policy sample by `plan` from the next call on, in place; returns it. See `bacinfer.apply`.

    Its `state_dict` and what `save_pretrained` writes stay as they were.

    Raises:
        TypeError: there is no adapter for the policy, or `plan` is something else.
        ValueError: lerobot's code is another than the adapter was written for, or as in `bacinfer.apply`.
        FileNotFoundError: there is no such file.
    """
    bacinfer.core.apply.apply(handle(policy), plan, engine=engine, precision=precision, for_this_policy=for_this_policy)
    return policy


def remove(policy: _Policy) -> _Policy:
    """Restores a policy exactly, in place; returns it. Raises as `bacinfer.remove`, and as `handle`."""
    bacinfer.core.apply.remove(handle(policy))
    return policy


def summary(policy: PreTrainedPolicy) -> CacheSummary:
    """What is applied to a policy, in figures. Raises as `bacinfer.summary`, and as `handle`."""
    return bacinfer.core.apply.summary(handle(policy))


def find_plan(policy: PreTrainedPolicy, observations: Iterable[Mapping[str, Any]], **settings: Any) -> SamplingPlan:
    """Finds the BAC plan of a policy, see `bacinfer.find_plan`, whose other arguments are the settings.

    Args:
        policy: The policy; its queues and torch's random state are left as they were.
        observations: What `select_action` takes: batches as the policy's preprocessor returns them, on its device. Each
            counts as the first one of an episode.
        **settings: ``num_updates``, ``num_bu_blocks``, ``metric``, ``noise_seed``.

    Raises:
        TypeError: there is no adapter for the policy.
        ValueError: lerobot's code is another than the adapter was written for, or as in `bacinfer.find_plan`.
        RuntimeError: as `bacinfer.find_plan`.
    """
    return bacinfer.analysis.find_plan.find_plan(handle(policy), observations, **settings)


def measure(
    policy: PreTrainedPolicy,
    plans: Mapping[str, SamplingPlan | CacheSchedule | str | Path],
    observations: Iterable[Mapping[str, Any]],
    **settings: Any,
) -> Measurements:
    """Measures what plans do to a policy's action chunks and to their latency, see `bacinfer.measure`.

    Args:
        policy: The policy; its queues and torch's random state are left as they were.
        plans: Names to plans.
        observations: As for `find_plan`.
        **settings: ``engine``, ``num_calls``, ``noise_seed``.

    Raises:
        TypeError, ValueError, FileNotFoundError, RuntimeError: as `bacinfer.measure`, and as `handle`.
    """
    return bacinfer.measurement.plans.measure(handle(policy), plans, observations, **settings)
