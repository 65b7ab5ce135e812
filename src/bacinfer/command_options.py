"""Flags that several commands share, and how a command reports a user's mistake."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bacinfer.core.diffusion_cache_wrapper import CACHE_MODES, FastDiffusionPolicy
from bacinfer.core.engines import AUTO, ENGINES
from bacinfer.policies import Checkpoint, build_policy, read_checkpoint

DEFAULT_NUM_CACHES = 10


def run_command(
    command: Callable[[argparse.Namespace], int], parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> int:
    """Parses `argv`, runs `command` and returns its exit status.

    What a user can get wrong (ValueError, OSError, RuntimeError, ImportError) becomes one line on stderr
    and exit status 2; an interrupt 130.
    """
    args = parser.parse_intermixed_args(argv)
    try:
        return command(args)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130


def add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    """-c, -d, --trust_checkpoint and --debug."""
    parser.add_argument("-c", "--checkpoint", required=True, metavar="CKPT", help="Diffusion Policy checkpoint (.ckpt)")
    parser.add_argument(
        "-d",
        "--device",
        default="cpu",
        metavar="DEVICE",
        help="where the policy runs: cpu, cuda, cuda:1, … (default: cpu)",
    )
    parser.add_argument(
        "--trust_checkpoint",
        action="store_true",
        help="load a checkpoint that can run code of its own; only for files whose source you trust",
    )
    add_debug_argument(parser)


def add_debug_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")


def load_policy_and_config(args: argparse.Namespace) -> tuple[Any, Checkpoint]:
    """The policy on its device, and the checkpoint with the config that it was built from.

    Raises:
        ValueError: if there is no such device, besides what `read_checkpoint` and `build_policy` raise.
    """
    device = check_device(args.device)
    checkpoint = read_checkpoint(args.checkpoint, trust_checkpoint=args.trust_checkpoint)
    return build_policy(checkpoint, device), checkpoint


def check_device(name: str) -> torch.device:
    """Raises ValueError if PyTorch has no such device here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here ({reason}); try --device cpu") from error
    return device


def add_cache_arguments(parser: argparse.ArgumentParser) -> None:
    """The cache mode and its arguments, in a group of their own."""
    group = parser.add_argument_group("caching")
    group.add_argument(
        "--cache_mode",
        choices=CACHE_MODES,
        default="original",
        help="original: no cache; threshold: all blocks update every few steps; optimal: each block at its own update "
        "steps (BAC); edit: all blocks at --edit_steps (default: original)",
    )
    group.add_argument("--cache_threshold", type=int, metavar="N", help="threshold: interval between updates, in steps")
    group.add_argument("--optimal_steps_dir", metavar="DIR", help="optimal: assets/TASK/original/optimal_steps/METRIC")
    group.add_argument(
        "--num_caches",
        type=int,
        metavar="M",
        help=f"optimal: update steps of each block (default: {DEFAULT_NUM_CACHES}); threshold: M updates in all, that "
        "is an interval of ceil(K / M)",
    )
    group.add_argument("--metric", default="cosine", help="optimal: similarity of the schedule (default: cosine)")
    group.add_argument(
        "--num_bu_blocks",
        type=int,
        default=0,
        metavar="N",
        help="optimal: blocks that bubbling union extends (default: 0)",
    )
    group.add_argument("--edit_steps", type=integers, metavar="0,20,40", help="edit: update steps of all blocks")
    add_engine_argument(group)


def add_engine_argument(parser: argparse._ActionsContainer) -> None:
    """--engine"""
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default=AUTO,
        help="what runs the schedule: auto, the fastest that can; eager, layer by layer; fused, the whole denoising "
        "loop as one program; cuda_graph, as one CUDA graph. With --cache_mode original the last two are lossless "
        "(default: %(default)s)",
    )


def apply_cache_arguments(policy: Any, args: argparse.Namespace) -> Any:
    """Applies the cache that the flags of `add_cache_arguments` ask for; returns the policy.

    Raises:
        ValueError, FileNotFoundError: as `FastDiffusionPolicy.apply_cache`.
    """
    return FastDiffusionPolicy.apply_cache(
        policy,
        cache_threshold=cache_threshold(args, policy.num_inference_steps),
        optimal_steps_dir=args.optimal_steps_dir if args.cache_mode == "optimal" else None,
        num_caches=args.num_caches or DEFAULT_NUM_CACHES,
        metric=args.metric,
        cache_mode=args.cache_mode,
        num_bu_blocks=args.num_bu_blocks,
        edit_steps=args.edit_steps,
        engine=args.engine,
    )


def cache_threshold(args: argparse.Namespace, num_inference_steps: int) -> int:
    """The interval of mode 'threshold': as given, or ⌈K / M⌉, or 5."""
    if args.cache_threshold is not None:
        return args.cache_threshold
    if args.num_caches is not None and args.num_caches >= 1:
        return -(-num_inference_steps // args.num_caches)
    return 5


def integers(text: str) -> list[int]:
    """An argparse type: integers separated by commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected integers separated by commas, such as 5,8,10, got {text!r}"
        ) from None


def names(text: str) -> list[str]:
    """An argparse type: names separated by commas."""
    found = [part.strip() for part in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"expected names separated by commas, such as cosine,l1, got {text!r}")
    return found
