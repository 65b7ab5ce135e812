"""The quick start: analyse a policy, cache it, and compare rollouts of the plain and the cached policy.

The command behind ``bash shell/quickstart.sh`` and ``bacinfer demo``.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from bacinfer.analysis.pipeline import DEFAULT_BUDGETS, Sampling, analyse_policy
from bacinfer.analysis.residuals import DEFAULT_DEMO, DEFAULT_SEED, file_digest
from bacinfer.assets import RunAssets
from bacinfer.commands.episode_options import report_failures
from bacinfer.commands.options import add_policy_arguments, command_line, load_policy_and_task, path_argument
from bacinfer.core.plan import SamplingPlan
from bacinfer.experiments.experiment import Experiment, run_all
from bacinfer.experiments.method import parse_methods
from bacinfer.experiments.run_files import PLAN_FILE
from bacinfer.files import write_text
from bacinfer.report.table import format_methods
from bacinfer.report.video import write_side_by_side

SHIPPED_CHECKPOINT = Path(__file__).with_name("pusht_transformer.ckpt")  # the one in assets/
METRIC = "cosine"
METHODS = parse_methods("plain,own:10+lossless,bac:20:5,bac:10:5")  # the plain policy first, BAC last


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quickstart",
        description="Finds update steps for a policy, applies them, and compares rollouts of the plain and the cached "
        "policy on the same seeds with the same noise: a table, a side-by-side video and pictures of the schedules.",
    )
    add_policy_arguments(parser, default=SHIPPED_CHECKPOINT)
    parser.add_argument(
        "-o",
        "--output_dir",
        type=path_argument,
        default=Path("outputs/quickstart"),
        metavar="OUT",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--episodes", type=int, default=16, metavar="N", help="episodes of each policy (default: %(default)s)"
    )
    parser.add_argument(
        "--latency_calls", type=int, default=20, metavar="N", help="how many calls to time (default: %(default)s)"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    if args.episodes < 1:
        raise ValueError(f"--episodes {args.episodes}: expected at least one")
    start = time.perf_counter()
    policy, task = load_policy_and_task(args)

    assets = RunAssets(args.output_dir / task.name / "original")
    experiments = [
        Experiment(
            checkpoint=str(args.checkpoint),
            method=method,
            n_test=args.episodes,
            latency_calls=args.latency_calls,
            device=args.device,
            assets_dir=str(assets.directory),
            trust_checkpoint=args.trust_checkpoint,
        )
        for method in METHODS
    ]

    print(f"1. Find the update steps of {args.checkpoint}", flush=True)
    sampling = Sampling(
        file_digest(args.checkpoint), policy.num_inference_steps, observations_per_demo=1, noise_seed=DEFAULT_SEED
    )
    analyse_policy(policy, task, assets, [DEFAULT_DEMO], [METRIC], DEFAULT_BUDGETS, sampling)

    print("2. Roll out the plain and the cached policy", flush=True)
    outcomes = run_all(experiments, args.output_dir, film=True, debug=args.debug)
    rows = [outcome.row for outcome in outcomes if outcome.row is not None]
    if len(rows) < len(outcomes):
        return report_failures(outcomes)

    plain, bac = rows[0], rows[-1]
    video = write_side_by_side(args.output_dir / "side_by_side.mp4", args.output_dir, [plain, bac])
    schedule = SamplingPlan.load(args.output_dir / bac.directory / PLAN_FILE).cache
    write_text(args.output_dir / "schedule.txt", f"{schedule}\n")
    print(f"\n{schedule}\n\n{format_methods(rows)}\n")
    print(
        f"Video: {video}\nSchedules: {assets.directory / 'figures' / f'schedules_{METRIC}.png'}\n"
        f"Took {time.perf_counter() - start:.0f} s."
    )
    return 0


main = command_line(run, build_parser)

if __name__ == "__main__":
    sys.exit(main())
