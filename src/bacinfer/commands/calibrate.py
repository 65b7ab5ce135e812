"""The fastest plan of a checkpoint that loses nothing, or the best one for a latency: ``bacinfer calibrate``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from bacinfer.commands.episode_options import add_environment_argument, check_environment
from bacinfer.commands.options import (
    add_engine_argument,
    add_output_argument,
    add_policy_arguments,
    add_precision_argument,
    command_line,
    integers,
    load_policy_and_task,
)
from bacinfer.experiments.calibration import NUM_FRESH, ROUNDS, Target, calibrate
from bacinfer.experiments.method import GRAMMAR, parse_methods
from bacinfer.experiments.plans import make_plans
from bacinfer.experiments.schedules import analysis_observations, found_at
from bacinfer.lerobot.installation import needing_lerobot
from bacinfer.policies.device import check_device
from bacinfer.report.frontier import write_frontier
from bacinfer.tasks import Task


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bacinfer calibrate",
        description="Runs plans of all costs in the checkpoint's task, against the plain policy on the same episodes, "
        "keeps the promising ones for longer, and confirms the winner on fresh episodes. Writes OUT/plan.json, for "
        "bacinfer.apply, and OUT/calibration.html. Run it again to go on after an interruption.",
        epilog=f"methods:\n{GRAMMAR}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_policy_arguments(parser, lerobot="--env")
    add_environment_argument(parser)
    add_output_argument(parser, "where results go")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--latency_ms", type=float, metavar="MS", help="the best plan that takes at most MS a call")
    target.add_argument(
        "--frequency", type=float, metavar="HZ", help="the best plan that makes at least HZ calls a second"
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=0.02,
        metavar="M",
        help="a plan loses nothing where its score is less than M below the plain policy's (default: %(default)s)",
    )
    parser.add_argument(
        "--stateful",
        action="store_true",
        help="try warm starts too: for a policy that serves one robot, or one batch of environments, and is reset at "
        "the start of every episode",
    )
    parser.add_argument("--methods", metavar="A,B", help="what to try (default: a search over all kinds)")
    parser.add_argument(
        "--rounds",
        type=integers,
        default=list(ROUNDS),
        metavar="N,N",
        help=f"episodes of each plan after each round (default: {','.join(map(str, ROUNDS))})",
    )
    parser.add_argument(
        "--fresh", type=int, default=NUM_FRESH, metavar="N", help="episodes to confirm on (default: %(default)s)"
    )
    parser.add_argument("--noise_seed", type=int, default=0, metavar="SEED", help="of the sampling noise")
    add_engine_argument(parser)
    add_precision_argument(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    policy, task = _load(args)
    latency = None if args.latency_ms is None else args.latency_ms / 1e3
    if args.frequency is not None:
        if not args.frequency > 0:
            raise ValueError(f"--frequency {args.frequency}: expected a number above 0")
        latency = 1 / args.frequency
    methods = parse_methods(args.methods) if args.methods else None
    if methods and not args.stateful and any(method.warm_start is not None for method in methods):
        raise ValueError("--methods names warm starts, which keep state between calls: add --stateful if that is meant")
    target = Target(latency, args.margin)
    plans = None
    if methods:
        plans = make_plans(policy, methods, found_at(analysis_observations(policy, task)))
    found = calibrate(
        policy,
        task,
        args.output_dir,
        target,
        plans=plans,
        stateful=args.stateful,
        engine=args.engine,
        precision=args.precision,
        rounds=args.rounds,
        num_fresh=args.fresh,
        noise_seed=args.noise_seed,
    )
    print(f"\n{found}")
    page = write_frontier(found, args.output_dir, task.name)
    print(f"results: {args.output_dir / 'plan.json'}, {page}")
    return 0


def _load(args: argparse.Namespace) -> tuple[Any, Task]:
    check_environment(args)
    if args.lerobot is not None:
        return needing_lerobot("environment").load_subject(args.lerobot, args.env, check_device(args.device))
    return load_policy_and_task(args)


main = command_line(run, build_parser)

if __name__ == "__main__":
    sys.exit(main())
