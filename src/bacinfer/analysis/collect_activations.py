"""Records the residuals of one sampled action: ``python -m bacinfer.analysis.collect_activations``."""

from __future__ import annotations

import argparse
import sys

from bacinfer import assets
from bacinfer.analysis.residuals import file_digest, recording_source, recordings, write_recording
from bacinfer.commands.options import (
    add_cache_arguments,
    add_folder_argument,
    add_output_argument,
    add_policy_arguments,
    add_start_arguments,
    apply_request,
    cache_request,
    command_line,
    load_policy_and_config,
)
from bacinfer.core.cache_request import CacheRequest
from bacinfer.tasks import make_task


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bacinfer.analysis.collect_activations",
        description="Samples one action and stores what each residual block of the policy contributed at each "
        "denoising step, as OUT/TASK/MODE/activations.npz, where MODE is original, threshold_N, "
        "optimal_METRIC_caches_M or edit_steps_A_B_C.",
    )
    add_policy_arguments(parser)
    add_output_argument(parser, "assets directory to write to")
    add_folder_argument(parser)
    add_start_arguments(parser)
    add_cache_arguments(parser)
    parser.add_argument("--force", action="store_true", help="overwrite residuals that are there already")
    return parser


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
    source = recording_source(policy, file_digest(args.checkpoint), args.demo_idx, args.noise_seed)
    if run.activations.is_file() and not args.force:
        if assets.read_by_block(run.activations)[1].get("source") == source:
            print(f"{run.activations} is there already (--force records it again)")
            return 0
        raise ValueError(
            f"{run.activations} holds residuals of another checkpoint, start, seed or schedule; "
            f"pass --force to overwrite it, or another --output_dir or --task"
        )
    task = make_task(checkpoint.cfg, trust_checkpoint=args.trust_checkpoint)
    (recording,) = recordings(policy, task, args.demo_idx, 1, args.noise_seed)
    write_recording(run, recording, source)
    first = next(iter(recording.residuals.values()))
    print(
        f"recorded {len(recording.residuals)} blocks, residuals [K, B, T, D] = {list(first.shape)}: "
        f"{run.activations} ({run.activations.stat().st_size / 1e6:.1f} MB)"
    )
    return 0


main = command_line(collect, build_parser)

if __name__ == "__main__":
    sys.exit(main())
