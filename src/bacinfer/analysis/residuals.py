"""Policy -> residuals: records what every residual block contributes at every denoising step of one sampled action.

The residuals are those that the policy uses: computed ones, or, under a cache, the stored ones where it reuses them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bacinfer import assets
from bacinfer.analysis.similarity import check_residuals, num_finite_steps
from bacinfer.core.blocks import Block
from bacinfer.core.calls import sample, seeded_noise
from bacinfer.core.diffusion_cache_wrapper import FastDiffusionPolicy
from bacinfer.core.engines.observing import observe_residuals

if TYPE_CHECKING:
    from bacinfer.tasks import Task

DEFAULT_DEMO = 11
DEFAULT_SEED = 11


@dataclass(frozen=True)
class Recording:
    """What one call of a policy did.

    Attributes:
        residuals: Block key to its residuals [K, B, T, D], on the CPU, in the order of the forward.
        result: What the policy returned.
    """

    residuals: dict[str, Tensor]
    result: Any


def record(policy: Any, obs: Any, noise_seed: int) -> Recording:
    """Samples an action for `obs`, with noise from `noise_seed`, and keeps all residuals.

    Raises:
        ValueError: if a residual is not finite; names the denoising step and the block where that begins.
    """
    found: dict[str, list[list[Tensor]]] = {}  # a policy may denoise the entries of a batch one after another

    def keep(block: Block, step: int, residual: Tensor) -> None:
        steps = found.setdefault(block.key, [])
        if step == len(steps):
            steps.append([])
        steps[step].append(residual.detach().clone())

    with torch.no_grad(), seeded_noise(policy, noise_seed), observe_residuals(policy, keep):
        result = sample(policy, obs)
    residuals = {block: torch.stack([torch.cat(parts) for parts in steps]).cpu() for block, steps in found.items()}
    # NaN spreads: the block to name is that of the earliest step and, of equal ones, the first in the forward.
    for block in sorted(residuals, key=lambda block: num_finite_steps(residuals[block])):
        check_residuals(residuals[block], block)
    return Recording(residuals, result)


def recordings(policy: Any, task: Task, demo_idx: int, num_observations: int, noise_seed: int) -> Iterator[Recording]:
    """Recordings at the first policy calls of the episode that starts at `demo_idx`, each with noise of its own.

    The noise depends on the arguments alone, not on what was recorded before. An episode that ends early gives fewer.

    Raises:
        ValueError: if the seed or the demo is negative.
    """
    call_seed(noise_seed, demo_idx)  # what is negative is refused before the task runs
    return record_all(policy, task.observations(policy, demo_idx, num_observations), noise_seed, demo_idx)


def record_all(
    policy: Any, observations: Iterable[Any], noise_seed: int = DEFAULT_SEED, demo_idx: int = DEFAULT_DEMO
) -> Iterator[Recording]:
    """Recordings at observations, the index-th with the noise of the index-th policy call of a demo."""
    for index, obs in enumerate(observations):
        yield record(policy, obs, call_seed(noise_seed, demo_idx, index))


def call_seed(noise_seed: int, demo_idx: int, index: int = 0) -> int:
    """The seed of the sampling noise at the index-th policy call of a demo."""
    if noise_seed < 0 or demo_idx < 0:
        raise ValueError(f"noise_seed and demo_idx must not be negative, got {noise_seed} and {demo_idx}")
    return int(np.random.SeedSequence([noise_seed, demo_idx, index]).generate_state(1)[0])


def recording_source(policy: Any, checkpoint_sha256: str, demo_idx: int, noise_seed: int) -> dict[str, Any]:
    """What determines the first recording of a demo, as JSON can hold it."""
    schedule = FastDiffusionPolicy.summary(policy).schedule
    return {
        "checkpoint_sha256": checkpoint_sha256,
        "num_inference_steps": policy.num_inference_steps,
        "update_steps": {b: list(steps) for b, steps in schedule.update_steps.items()} if schedule else None,
        "demo_idx": demo_idx,
        "noise_seed": noise_seed,
    }


def write_recording(run: assets.RunAssets, recording: Recording, source: Mapping[str, Any]) -> None:
    """Stores the residuals, with half precision where they allow it, and where they are from."""
    arrays = {block: _compact(residuals) for block, residuals in recording.residuals.items()}
    assets.write_by_block(run.activations, arrays, arrays, source=dict(source))


def _compact(residuals: Tensor) -> NDArray[np.floating]:
    """float16, or float32 where the largest magnitude is outside of float16's normal range."""
    array = residuals.float().numpy()
    peak = np.abs(array).max()
    half = np.finfo(np.float16)
    return array.astype(np.float16) if peak == 0 or half.tiny <= peak <= half.max else array


def file_digest(path: str | Path) -> str:
    """The SHA-256 of a file, to tell one checkpoint from another."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
