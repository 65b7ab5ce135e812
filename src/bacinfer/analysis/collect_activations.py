"""Policy -> residuals: records what every residual block contributes at every denoising step of one sampled action.

The residuals are those that the policy uses: computed ones, or, under a cache, the stored ones where it reuses them.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bacinfer import assets
from bacinfer.analysis.similarity_metrics import check_residuals, num_finite_steps
from bacinfer.command_options import (
    add_cache_arguments,
    add_policy_arguments,
    apply_request,
    cache_request,
    load_policy_and_config,
    path_argument,
    run_command,
)
from bacinfer.core.blocks import Block
from bacinfer.core.cache_request import CacheRequest
from bacinfer.core.diffusion_cache_wrapper import FastDiffusionPolicy
from bacinfer.core.engines.observing import observe_residuals
from bacinfer.tasks import Task, make_task
from bacinfer.tasks.base import seeded_noise

DEFAULT_DEMO = 11
DEFAULT_SEED = 11


@dataclass(frozen=True)
class Recording:
    """What one `predict_action` did.

    Attributes:
        residuals: Module name (``decoder.layers.0.dropout1``) to its residuals [K, B, T, D], on the CPU, in the order
            of the forward.
        block_keys: Module name to block key (``decoder.layers.0_sa_block``).
        result: What `predict_action` returned.
    """

    residuals: dict[str, Tensor]
    block_keys: dict[str, str]
    result: dict[str, Tensor]


def record(policy: Any, obs: Mapping[str, Tensor], noise_seed: int) -> Recording:
    """Samples an action for `obs`, with noise from `noise_seed`, and keeps all residuals.

    Raises:
        ValueError: if a residual is not finite; names the denoising step and the block where that begins.
    """
    steps: dict[str, list[Tensor]] = {}
    block_keys: dict[str, str] = {}

    def keep(block: Block, step: int, residual: Tensor) -> None:
        block_keys[block.module_name] = block.key
        steps.setdefault(block.module_name, []).append(residual.detach().clone())

    with torch.no_grad(), seeded_noise(policy, noise_seed), observe_residuals(policy, keep):
        result = policy.predict_action(obs)
    residuals = {module: torch.stack(tensors).cpu() for module, tensors in steps.items()}
    # NaN spreads: the block to name is that of the earliest step and, of equal ones, the first in the forward.
    for module in sorted(residuals, key=lambda module: num_finite_steps(residuals[module])):
        check_residuals(residuals[module], module)
    return Recording(residuals, block_keys, result)


def recordings(policy: Any, task: Task, demo_idx: int, num_observations: int, random_seed: int) -> Iterator[Recording]:
    """Recordings at the first policy calls of the episode that starts at `demo_idx`, each with noise of its own.

    The noise depends on the arguments alone, not on what was recorded before.
    """
    seeds = [noise_seed(random_seed, demo_idx, index) for index in range(num_observations)]
    observations = task.observations(policy, demo_idx, num_observations)
    for obs, seed in zip(observations, seeds, strict=False):  # an episode may end early
        yield record(policy, obs, seed)


def noise_seed(random_seed: int, demo_idx: int, index: int = 0) -> int:
    """The seed of the sampling noise at the index-th policy call of a demo."""
    if random_seed < 0 or demo_idx < 0:
        raise ValueError(f"random_seed and demo_idx must not be negative, got {random_seed} and {demo_idx}")
    return int(np.random.SeedSequence([random_seed, demo_idx, index]).generate_state(1)[0])


def recording_source(policy: Any, checkpoint_sha256: str, demo_idx: int, random_seed: int) -> dict[str, Any]:
    """What determines the first recording of a demo, as JSON can hold it."""
    schedule = FastDiffusionPolicy.summary(policy).schedule
    return {
        "checkpoint_sha256": checkpoint_sha256,
        "num_inference_steps": policy.num_inference_steps,
        "update_steps": {b: list(steps) for b, steps in schedule.update_steps.items()} if schedule else None,
        "demo_idx": demo_idx,
        "random_seed": random_seed,
    }


def write_recording(run: assets.RunAssets, recording: Recording, source: Mapping[str, Any]) -> None:
    """Stores the residuals, with half precision where they allow it, and where they are from."""
    arrays = {module: _compact(residuals) for module, residuals in recording.residuals.items()}
    assets.write_arrays(run.activations, arrays, {"blocks": recording.block_keys, "source": dict(source)})


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


# -- the command -------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bacinfer.analysis.collect_activations",
        description="Samples one action and stores what each residual block of the policy contributed at each "
        "denoising step, as OUT/TASK/MODE/activations.npz, where MODE is original, threshold_N, "
        "optimal_METRIC_caches_M or edit_steps_A_B_C.",
    )
    add_policy_arguments(parser)
    parser.add_argument(
        "-o", "--output_dir", required=True, type=path_argument, metavar="OUT", help="assets directory to write to"
    )
    parser.add_argument(
        "-t", "--task", required=True, type=path_argument, metavar="TASK", help="name of the task's folder in OUT"
    )
    add_start_arguments(parser)
    add_cache_arguments(parser)
    parser.add_argument("--force", action="store_true", help="overwrite residuals that are there already")
    return parser


def add_start_arguments(parser: argparse.ArgumentParser) -> None:
    """--demo_idx and --random_seed: where an episode starts, and the sampling noise."""
    parser.add_argument(
        "--demo_idx",
        type=int,
        default=DEFAULT_DEMO,
        metavar="N",
        help="start of the episode whose first observation is used: below 10000 a training start (demonstration or "
        f"seed), from 10000 on a test seed (default: {DEFAULT_DEMO})",
    )
    add_seed_argument(parser)


def add_seed_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--random_seed",
        type=int,
        default=DEFAULT_SEED,
        metavar="SEED",
        help=f"seed of the sampling noise (default: {DEFAULT_SEED})",
    )


def run_name(request: CacheRequest, num_inference_steps: int) -> str:
    """The folder of a cache mode's recordings."""
    match request.mode:
        case "threshold":
            return f"threshold_{request.interval(num_inference_steps)}"
        case "optimal":
            return f"optimal_{request.arguments['metric']}_caches_{request.arguments['num_caches']}"
        case "edit":
            return "edit_steps_" + "_".join(map(str, request.arguments["edit_steps"]))
        case _:
            return "original"


def collect(args: argparse.Namespace) -> int:
    request = cache_request(args)
    policy, checkpoint = load_policy_and_config(args)
    apply_request(policy, request, args.engine)
    run = assets.RunAssets(args.output_dir / args.task / run_name(request, policy.num_inference_steps))
    source = recording_source(policy, file_digest(args.checkpoint), args.demo_idx, args.random_seed)
    if run.activations.is_file() and not args.force:
        if assets.read_arrays(run.activations)[1].get("source") == source:
            print(f"{run.activations} is there already (--force records it again)")
            return 0
        raise ValueError(
            f"{run.activations} holds residuals of another checkpoint, start, seed or schedule; "
            f"pass --force to overwrite it, or another --output_dir or --task"
        )
    task = make_task(checkpoint.cfg, trust_checkpoint=args.trust_checkpoint)
    (recording,) = recordings(policy, task, args.demo_idx, 1, args.random_seed)
    write_recording(run, recording, source)
    first = next(iter(recording.residuals.values()))
    print(
        f"recorded {len(recording.residuals)} blocks, residuals [K, B, T, D] = {list(first.shape)}: "
        f"{run.activations} ({run.activations.stat().st_size / 1e6:.1f} MB)"
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(collect, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
