"""Flags of the commands that evaluate, and the experiments that they ask for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import Any

from bacinfer.core.cache_request import DEFAULT_THRESHOLD, CacheRequest
from bacinfer.core.engines import LOSSLESS_ENGINES
from bacinfer.experiments.experiment import (
    DEFAULT_EPISODES,
    DEFAULT_FIRST_EPISODE_SEED,
    DEFAULT_LATENCY_CALLS,
    Outcome,
)
from bacinfer.experiments.method import PLAIN, Method


def add_environment_argument(parser: argparse.ArgumentParser) -> None:
    """--env"""
    parser.add_argument(
        "--env",
        metavar="TYPE[,KEY=VALUE...]",
        help="with --lerobot: the environment, as lerobot-eval has it after --env.type and --env., such as "
        "pusht,episode_length=100; the score is the highest reward there, elsewhere success",
    )


def add_episode_arguments(parser: argparse.ArgumentParser) -> None:
    """--n_test, --n_envs, --disturb, --latency_calls and --force."""
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
        "--disturb",
        action="store_true",
        help="move the object or the hand once in each episode, when and how far is up to its seed: equally for all "
        "methods (tasks that bacinfer simulates itself)",
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
    """--first_episode_seed and --noise_seed."""
    parser.add_argument(
        "--first_episode_seed",
        "--seed",
        type=int,
        default=DEFAULT_FIRST_EPISODE_SEED,
        metavar="SEED",
        help="seed of the first episode; the others follow (default: %(default)s)",
    )
    parser.add_argument(
        "--noise_seed", type=int, default=0, metavar="SEED", help="seed of the sampling noise (default: %(default)s)"
    )


def episode_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `Experiment` from the flags of those above, `add_policy_arguments`, `add_engine_argument` and
    `add_precision_argument`.

    Raises:
        ValueError: as `check_environment`.
    """
    check_environment(args)
    episodes = ("n_test", "n_envs", "disturb", "first_episode_seed", "noise_seed", "latency_calls", "env")
    names = (*episodes, "device", "engine", "precision", "trust_checkpoint")
    return {"checkpoint": str(args.checkpoint or args.lerobot), **{name: getattr(args, name) for name in names}}


def check_environment(args: argparse.Namespace) -> None:
    """Raises ValueError if there is --env without --lerobot, or the other way round."""
    if (args.lerobot is None) != (args.env is None):
        raise ValueError("--lerobot and --env go together: a checkpoint of LeRobot's, and the environment to run it in")


def check_precision_has_effect(precision: str | None, methods: Iterable[Method]) -> None:
    """Raises ValueError if a precision is given that none of the methods can have."""
    methods = list(methods)
    if precision is not None and all(method.as_it_is for method in methods):
        names = ", ".join(method.spec for method in methods)
        raise ValueError(
            f"--precision {precision} has no effect with {names}, which the policy's own code runs: leave it out, or "
            f"choose a method that an engine runs, such as own:10+lossless"
        )


def cache_method(request: CacheRequest, engine: str) -> Method:
    """The method that a cache is, as a row of the results.

    Raises:
        ValueError: numbers that no method can have.
    """
    given = request.arguments
    match request.mode:
        case "edit":
            return Method("edit", steps=tuple(given["edit_steps"]))
        case "optimal":
            return Method("bac", **{name: given[name] for name in ("num_caches", "num_bu_blocks", "metric")})
        case "threshold" if "num_caches" in given:
            return Method("uniform", num_caches=given["num_caches"])
        case "threshold":
            return Method("threshold", interval=given.get("cache_threshold", DEFAULT_THRESHOLD))
        case _:
            return Method("lossless") if engine in LOSSLESS_ENGINES else PLAIN


def report_failures(outcomes: Iterable[Outcome]) -> int:
    """Names what failed, at the end where it is seen; the exit status of a command."""
    failures = [outcome for outcome in outcomes if outcome.row is None]
    for outcome in failures:
        what = f"{outcome.experiment.label} on {outcome.experiment.checkpoint}"
        print(f"error: {what} {outcome.status}: {outcome.detail}", file=sys.stderr)
    return 1 if failures else 0
