"""How fast a checkpoint's policy is on this machine: ``bacinfer bench``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bacinfer.commands.options import (
    add_policy_arguments,
    command_line,
    integers,
    load_policy_and_task,
    path_argument,
)
from bacinfer.core.blocks import find_blocks
from bacinfer.core.engines import AUTO, ENGINES
from bacinfer.experiments.method import GRAMMAR, parse_methods
from bacinfer.experiments.plans import make_plans
from bacinfer.experiments.schedules import found_at
from bacinfer.files import write_json, write_text
from bacinfer.measurement.bench import bench
from bacinfer.report.bench import bench_data, format_bench

DEFAULT_METHODS = ("lossless", "own:10", "bac:10:5")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bacinfer bench",
        description="Times a policy's calls on this machine: plans in every engine and precision that can run them, in "
        "turn with the plain policy, beside what the machine itself can do. Speed depends on a policy's sizes, not on "
        "its weights.",
        epilog=f"methods:\n{GRAMMAR}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_policy_arguments(parser)
    parser.add_argument(
        "-o",
        "--output_dir",
        type=path_argument,
        metavar="OUT",
        help="where bench.json and bench.md go (default: nowhere)",
    )
    parser.add_argument(
        "--methods", metavar="A,B", help=f"what to time (default: those of {','.join(DEFAULT_METHODS)} that fit K)"
    )
    parser.add_argument(
        "--engines",
        metavar="A,B",
        help="what runs them, of eager, onednn, fused and cuda_graph (default: all that are for the device)",
    )
    parser.add_argument(
        "--batches", type=integers, default=[1], metavar="N,N", help="observations a call (default: 1, a robot's)"
    )
    parser.add_argument("--calls", type=int, default=20, metavar="N", help="of each (default: %(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="of PyTorch and compiled code (default: PyTorch's)")
    return parser


def run(args: argparse.Namespace) -> int:
    engines = _engines(args)
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads {args.threads}: expected at least one")
        torch.set_num_threads(args.threads)
    policy, task = load_policy_and_task(args)
    observation = next(task.observations(policy, 0))
    K = policy.num_inference_steps
    methods = args.methods or ",".join(DEFAULT_METHODS[: 1 if K <= 10 else None])
    plans = make_plans(policy, parse_methods(methods), found_at([observation]))
    found = bench(policy, plans, observation, engines=engines, batches=args.batches, num_calls=args.calls)
    about = _about(policy, args.checkpoint)
    print(format_bench(found, about))
    if args.output_dir is not None:
        write_json(args.output_dir / "bench.json", bench_data(found, about))
        write_text(args.output_dir / "bench.md", format_bench(found, about, markdown=True) + "\n")
        print(f"results: {args.output_dir / 'bench.json'}, {args.output_dir / 'bench.md'}")
    return 0


def _engines(args: argparse.Namespace) -> Sequence[str]:
    on_device = [name for name in ENGINES if name != AUTO and (name != "cuda_graph" or args.device != "cpu")]
    names = on_device if args.engines is None else args.engines.split(",")
    unknown = [name for name in names if name not in ENGINES or name == AUTO]
    if unknown:
        raise ValueError(
            f"--engines {args.engines}: there is no {', '.join(unknown)}; there are {', '.join(on_device)}"
        )
    return names


def _about(policy: Any, checkpoint: Path) -> str:
    """What a policy is, as far as its speed depends on it."""
    blocks = find_blocks(policy.model)
    layers, weights = len({block.layer_name for block in blocks}), sum(block.num_weights for block in blocks)
    size = f"{layers} layers, {weights / 1e6:.1f} million weights in blocks"
    return f"{checkpoint.name}: {size}, K = {policy.num_inference_steps}"


main = command_line(run, build_parser)

if __name__ == "__main__":
    sys.exit(main())
