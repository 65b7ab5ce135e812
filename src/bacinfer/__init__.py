"""Fast diffusion policies without retraining: block-wise adaptive caching (BAC, arXiv 2506.13456), in one line."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bacinfer._installation import __version__  # first: it refuses systems that are not supported
from bacinfer.analysis.find_plan import find_plan, find_sensitive_plan
from bacinfer.core.apply import apply, refresh, remove, summary
from bacinfer.core.blocks import ResidualBlock, register_layer, unregister_layer
from bacinfer.core.bubbling import bubbling_union
from bacinfer.core.diffusion_cache_wrapper import FastDiffusionPolicy
from bacinfer.core.handle import Policy, PolicyHandle
from bacinfer.core.plan import SamplingPlan
from bacinfer.core.sampler import Sampler
from bacinfer.core.schedule import CacheSchedule
from bacinfer.core.summary import CacheSummary
from bacinfer.core.warm_start import WarmStart
from bacinfer.measurement.plans import Measurements, measure

if TYPE_CHECKING:
    import torch

    from bacinfer.experiments.calibration import Calibration
    from bacinfer.experiments.prediction import Prediction
    from bacinfer.tasks import Task

__all__ = [
    "CacheSchedule",
    "CacheSummary",
    "FastDiffusionPolicy",
    "Measurements",
    "Policy",
    "PolicyHandle",
    "ResidualBlock",
    "Sampler",
    "SamplingPlan",
    "WarmStart",
    "__version__",
    "apply",
    "bubbling_union",
    "calibrate",
    "find_plan",
    "find_sensitive_plan",
    "load_policy",
    "measure",
    "refresh",
    "register_layer",
    "remove",
    "summary",
    "unregister_layer",
]


def load_policy(checkpoint: str | Path, device: str | torch.device = "cpu", *, trust_checkpoint: bool = False) -> Any:
    """The policy of a Diffusion Policy checkpoint, ready to act (EMA weights where it has them, eval mode).

    Classes of the package ``diffusion_policy`` are used where it is importable, otherwise a stand-in for its
    transformer policies.

    Args:
        checkpoint: A file that Diffusion Policy or this package's training wrote.
        device: Where the policy shall run.
        trust_checkpoint: Whether code from the file may run. Without it only tensors and configuration are admitted.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no readable checkpoint, asks for more than data, or its policy cannot be built here.
    """
    from bacinfer import policies  # Hydra and diffusers take seconds to import

    return policies.load_policy(checkpoint, device, trust_checkpoint=trust_checkpoint)


def calibrate(
    policy: Any,
    task: Task | None,
    output_dir: str | Path,
    *,
    observations: Iterable[Any] | None = None,
    latency_ms: float | None = None,
    margin: float = 0.02,
    stateful: bool = False,
    **settings: Any,
) -> Calibration | Prediction:
    """Finds the fastest plan of a policy that loses no success, by episodes; ``.plan`` of what is returned is it.

    Plans of all costs run the same episodes as the plain policy; what promises most is confirmed on episodes that chose
    nothing. Takes minutes, shows its progress, and goes on after an interruption. Without a simulator, the plan for a
    latency is predicted from observations.

    Args:
        policy: A policy of Diffusion Policy's kind, or a handle; it is left as it was.
        task: Runs its episodes: ``bacinfer.tasks.make_task(...)``, or an object of your own with its two methods.
            None: there is none.
        output_dir: Where plan.json and what was measured are kept.
        observations: Without a task: what the policy samples at, dicts of tensors [1, ...].
        latency_ms: Asks for the best plan that takes at most so many milliseconds a call (median, batch 1).
        margin: A plan loses nothing where its mean score is below the plain policy's by less than this.
        stateful: Whether the plan may start a call from the last one's actions, see `apply`.
        settings: As of `bacinfer.experiments.calibration.calibrate` or `bacinfer.experiments.prediction.predict`.

    Raises:
        ValueError: no plan reaches the latency (says which one comes nearest), or what is given is not enough.
        RuntimeError: the simulator is missing or failed.
    """
    from bacinfer.experiments import calibration, prediction

    latency = None if latency_ms is None else latency_ms / 1e3
    if (task is None) == (observations is None):
        raise ValueError("a calibration takes a task, or observations where there is none: give one of them")
    if task is not None:
        target = calibration.Target(latency, margin)
        return calibration.calibrate(policy, task, output_dir, target, stateful=stateful, **settings)
    if latency is None or stateful:
        raise ValueError(
            "without a task nothing shows that a plan loses nothing, nor what a warm start does: give latency_ms, and "
            "the plan whose actions are most like the plain policy's is chosen of those that are fast enough"
        )
    return prediction.predict(policy, observations or (), output_dir, latency, **settings)
