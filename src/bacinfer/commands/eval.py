"""A policy with and without its cache: scores on the same episodes, latency, FLOPs and action error.

The command behind ``bacinfer eval`` and ``scripts/eval_fast_diffusion_policy.py``.
"""

from __future__ import annotations

import argparse
import sys

from bacinfer.assets import RunAssets
from bacinfer.commands.episode_options import (
    add_environment_argument,
    add_episode_arguments,
    add_seed_arguments,
    cache_method,
    check_precision_has_effect,
    episode_settings,
    report_failures,
)
from bacinfer.commands.options import (
    add_cache_arguments,
    add_output_argument,
    add_policy_arguments,
    add_precision_argument,
    cache_request,
    command_line,
)
from bacinfer.experiments.experiment import Experiment, check, run_all
from bacinfer.experiments.method import PLAIN, parse_methods
from bacinfer.experiments.run_files import copy_results
from bacinfer.report.table import format_methods
from bacinfer.report.video import write_side_by_side


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Scores, latency and FLOPs of a policy, plain and with its cache, on the same seeds. Run it again "
        "to go on after an interruption; what has a result is kept."
    )
    add_policy_arguments(parser, lerobot="--env")
    add_environment_argument(parser)
    add_output_argument(parser, "where the results are written")
    add_episode_arguments(parser)
    add_seed_arguments(parser)
    parser.add_argument("--skip_video", action="store_true", help="film no episode")
    parser.add_argument(
        "--baselines",
        default="",
        metavar="A,B",
        help="other methods for the same table, such as ddim:10,uniform:10 (see bacinfer compare --help)",
    )
    add_precision_argument(add_cache_arguments(parser))
    return parser


def run(args: argparse.Namespace) -> int:
    output_dir, film = args.output_dir, not args.skip_video
    request = cache_request(args)
    method = cache_method(request, args.engine)
    baselines = parse_methods(args.baselines) if args.baselines else []
    steps_dir = request.arguments.get("optimal_steps_dir")
    assets_dir = str(RunAssets.of_steps_dir(steps_dir).directory) if steps_dir else None
    check_precision_has_effect(args.precision, [method, *baselines])
    settings = episode_settings(args)
    experiments = {
        each: Experiment(method=each, assets_dir=assets_dir, **settings) for each in (PLAIN, method, *baselines)
    }
    if steps_dir is not None:
        experiments[method] = Experiment(method=method, optimal_steps_dir=str(steps_dir), **settings)
    check(experiments.values(), output_dir)
    outcomes = run_all(list(experiments.values()), output_dir, film=film, force=args.force, debug=args.debug)
    rows = {outcome.experiment.method: outcome.row for outcome in outcomes if outcome.row is not None}
    if method in rows:
        copy_results(output_dir / rows[method].directory, output_dir)
    if rows:
        print(format_methods(list(rows.values())))
        print(f"results: {output_dir}")
    if film and method != PLAIN and {PLAIN, method} <= rows.keys():
        write_side_by_side(output_dir / "media" / "side_by_side.mp4", output_dir, [rows[PLAIN], rows[method]])
    return report_failures(outcomes)


main = command_line(run, build_parser)

if __name__ == "__main__":
    sys.exit(main())
