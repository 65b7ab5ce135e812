"""Flags of the commands that evaluate, and the experiments that they ask for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import Any

from bacinfer.command_options import DEFAULT_NUM_CACHES
from bacinfer.core.engines import LOSSLESS_ENGINES
from bacinfer.evaluation.experiment import (
    DEFAULT_EPISODES,
    DEFAULT_FIRST_SEED,
    DEFAULT_LATENCY_CALLS,
    Outcome,
)
from bacinfer.evaluation.methods import PLAIN, Method


def add_episode_arguments(parser: argparse.ArgumentParser) -> None:
    """--n_test, --n_envs, --latency_calls and --force."""
    parser.add_argument(
        "--n_test",
        type=int,
        default=DEFAULT_EPISODES,
        metavar="N",
        help="episodes of each method (default: %(default)s)",
    )
    parser.add_argument(
        "--n_envs", type=int, metavar="N", help="environments that run at once (default: the task's own number)"
    )
    parser.add_argument(
        "--latency_calls",
        type=int,
        default=DEFAULT_LATENCY_CALLS,
        metavar="N",
        help="how many calls to time (default: %(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="evaluate again what has a result already")


def add_seed_arguments(parser: argparse.ArgumentParser) -> None:
    """--seed and --noise_seed."""
    parser.add_argument(
        "--seed",
        type=int,
        default=DEFAULT_FIRST_SEED,
        help="first test seed; the others follow (default: %(default)s)",
    )
    parser.add_argument(
        "--noise_seed", type=int, default=0, metavar="SEED", help="seed of the sampling noise (default: %(default)s)"
    )


def episode_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `Experiment` from the flags of the two above, `add_policy_arguments` and `add_engine_argument`."""
    names = ("checkpoint", "device", "trust_checkpoint", "n_test", "n_envs", "latency_calls", "noise_seed", "engine")
    return {"first_seed": args.seed, **{name: getattr(args, name) for name in names}}


def cache_method(args: argparse.Namespace) -> Method:
    """The method that the flags of `add_cache_arguments` ask for.

    Raises:
        ValueError: numbers that no method can have, or --edit_steps without its mode or the other way round.
    """
    if (args.edit_steps is not None) != (args.cache_mode == "edit"):
        raise ValueError("--edit_steps and --cache_mode edit go together")
    if args.cache_mode == "original" and args.engine in LOSSLESS_ENGINES:
        return Method("lossless")
    if args.cache_mode == "edit":
        return Method("edit", steps=tuple(args.edit_steps))
    if args.cache_mode == "optimal":
        num_caches = DEFAULT_NUM_CACHES if args.num_caches is None else args.num_caches
        return Method("bac", num_caches=num_caches, num_bu_blocks=args.num_bu_blocks, metric=args.metric)
    if args.cache_mode == "threshold":
        if args.cache_threshold is None and args.num_caches is not None:
            return Method("uniform", num_caches=args.num_caches)
        return Method("threshold", interval=5 if args.cache_threshold is None else args.cache_threshold)
    return PLAIN


def report_failures(outcomes: Iterable[Outcome]) -> int:
    """Names what failed, at the end where it is seen; the exit status of a command."""
    failures = [outcome for outcome in outcomes if outcome.row is None]
    for outcome in failures:
        what = f"{outcome.experiment.method.label} on {outcome.experiment.checkpoint}"
        print(f"error: {what} {outcome.status}: {outcome.detail}", file=sys.stderr)
    return 1 if failures else 0
