"""Several methods on one checkpoint and the same seeds, as a table and as a Pareto picture: ``bacinfer compare``."""

from __future__ import annotations

import argparse
import sys

from bacinfer.commands.episode_options import (
    add_environment_argument,
    add_episode_arguments,
    add_seed_arguments,
    check_precision_has_effect,
    episode_settings,
    report_failures,
)
from bacinfer.commands.options import (
    add_engine_argument,
    add_output_argument,
    add_policy_arguments,
    add_precision_argument,
    command_line,
    path_argument,
)
from bacinfer.experiments.experiment import Experiment, check, run_all
from bacinfer.experiments.method import GRAMMAR, PLAIN, parse_methods
from bacinfer.files import write_text
from bacinfer.report.pareto import plot_pareto
from bacinfer.report.table import format_methods
from bacinfer.report.video import film

DEFAULT_METHODS = (
    "plain,lossless,own:20+lossless,own:10+lossless,own:5+lossless,own:3+lossless,own:2+lossless,ddim:10+lossless,"
    "ddim:5+lossless,ddim:3+lossless,dpm:10+lossless,dpm:6+lossless,dpm:4+lossless,"
    "uniform:10,unified:10,bac:10:5,bac:20:5,own:20+bac:7:5"
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bacinfer compare",
        description="Evaluates methods on the same seeds and writes OUT/comparison.md and OUT/pareto.png|.svg. Run it "
        "again to go on after an interruption, or with more methods; what has a result is kept.",
        epilog=f"methods:\n{GRAMMAR}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_policy_arguments(parser, lerobot="--env")
    add_environment_argument(parser)
    add_output_argument(parser, "the results directory")
    parser.add_argument(
        "--methods",
        default=DEFAULT_METHODS,
        metavar="A,B",
        help="what to evaluate besides plain (default: %(default)s)",
    )
    parser.add_argument(
        "--assets_dir",
        type=path_argument,
        metavar="DIR",
        help="schedules to use, such as assets/pusht/original; those that it lacks are found from the policy, which "
        "takes seconds (default: all of them are)",
    )
    parser.add_argument("--film", action="store_true", help="film the first episode of what is evaluated")
    add_engine_argument(parser)
    add_precision_argument(parser)
    add_episode_arguments(parser)
    add_seed_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    if args.assets_dir is not None and not args.assets_dir.is_dir():
        raise FileNotFoundError(f"no directory {args.assets_dir}: --assets_dir is one such as assets/pusht/original")
    methods = dict.fromkeys([PLAIN, *parse_methods(args.methods)])
    if args.assets_dir is not None and not any(method.metric and method.sampler is None for method in methods):
        raise ValueError(
            "--assets_dir has no effect with these methods, none of which has schedules in it: leave it out"
        )
    check_precision_has_effect(args.precision, methods)
    settings = episode_settings(args)
    assets_dir = None if args.assets_dir is None else str(args.assets_dir)
    experiments = [Experiment(method=method, assets_dir=assets_dir, **settings) for method in methods]
    check(experiments, args.output_dir)
    outcomes = run_all(experiments, args.output_dir, film=args.film, force=args.force, debug=args.debug)
    rows = [outcome.row for outcome in outcomes if outcome.row is not None]
    if rows:
        print(format_methods(rows))
        write_text(args.output_dir / "comparison.md", format_methods(rows, markdown=True) + "\n")
        pictures = [args.output_dir / "pareto.png", args.output_dir / "pareto.svg"]
        plot_pareto(rows, *pictures)
        print(f"results: {args.output_dir / 'comparison.md'}, {', '.join(map(str, pictures))}")
    status = report_failures(outcomes)
    if args.film:
        for row in rows:
            film(args.output_dir, row)
    return status


main = command_line(run, build_parser)

if __name__ == "__main__":
    sys.exit(main())
