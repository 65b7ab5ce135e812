"""Flags that several commands share, and how a command reports a user's mistake."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bacinfer.analysis.block_statistics import DEFAULT_METRICS
from bacinfer.analysis.residuals import DEFAULT_DEMO, DEFAULT_SEED
from bacinfer.analysis.similarity import METRICS
from bacinfer.assets import RunAssets
from bacinfer.core.cache_request import (
    CACHE_MODES,
    DEFAULT_METRIC,
    DEFAULT_THRESHOLD,
    CacheRequest,
    resolve_request,
)
from bacinfer.core.diffusion_cache_wrapper import FastDiffusionPolicy
from bacinfer.core.engines import AUTO, ENGINES, PRECISIONS
from bacinfer.files import check_path
from bacinfer.policies import Checkpoint, build_policy, read_checkpoint
from bacinfer.policies.device import check_device
from bacinfer.tasks import Task, make_task

DEFAULT_NUM_CACHES = 10
DEFAULT_BU_BLOCKS = 5
OPTIMAL_DEFAULTS = {"metric": DEFAULT_METRIC, "num_bu_blocks": 0}
"""Flags of mode 'optimal', which scripts may write out in any mode."""


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


def command_line(
    command: Callable[[argparse.Namespace], int], build_parser: Callable[[], argparse.ArgumentParser]
) -> Callable[..., int]:
    """A command's ``main(argv)``, which without arguments takes those of the process; see `run_command`."""

    def main(argv: Sequence[str] | None = None) -> int:
        return run_command(command, build_parser(), argv)

    return main


def add_policy_arguments(
    parser: argparse.ArgumentParser, *, default: Path | None = None, lerobot: str | None = None
) -> None:
    """-c, -d, --trust_checkpoint and --debug.

    Args:
        default: The checkpoint where none is named; None: one has to be.
        lerobot: What observations come from where --lerobot names a checkpoint of LeRobot's instead; None: there is no
            such flag.
    """
    checkpoint = parser.add_mutually_exclusive_group(required=default is None)
    checkpoint.add_argument(
        "-c",
        "--checkpoint",
        type=path_argument,
        default=default,
        metavar="CKPT",
        help="Diffusion Policy checkpoint (.ckpt)",
    )
    if lerobot is not None:
        checkpoint.add_argument(
            "--lerobot",
            type=path_argument,
            metavar="DIR",
            help=f"LeRobot checkpoint (the directory with config.json), observations come from {lerobot}",
        )
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


def add_output_argument(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("-o", "--output_dir", required=True, type=path_argument, metavar="OUT", help=help)


def add_folder_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-t", "--task", required=True, type=path_argument, metavar="TASK", help="name of the task's folder in OUT"
    )


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


def load_policy_and_task(args: argparse.Namespace) -> tuple[Any, Task]:
    """The policy on its device, and its task. Raises as `load_policy_and_config` and `make_task`."""
    policy, checkpoint = load_policy_and_config(args)
    return policy, make_task(checkpoint.cfg, trust_checkpoint=args.trust_checkpoint)


def add_cache_arguments(parser: argparse.ArgumentParser) -> argparse._ActionsContainer:
    """The cache mode and its arguments, in a group of their own, which it returns; see `cache_request`."""
    group = parser.add_argument_group("caching", "A flag that has no effect in the mode is refused.")
    group.add_argument(
        "--cache_mode",
        choices=CACHE_MODES,
        help="original: no cache; threshold: all blocks update every few steps; optimal: each block at its own update "
        "steps (BAC); edit: all blocks at --edit_steps (default: optimal with --optimal_steps_dir, otherwise original)",
    )
    group.add_argument(
        "--cache_threshold",
        type=int,
        metavar="N",
        help=f"threshold: interval between updates, in steps (default: {DEFAULT_THRESHOLD})",
    )
    group.add_argument(
        "--optimal_steps_dir",
        type=path_argument,
        metavar="DIR",
        help="optimal: assets/TASK/original/optimal_steps/METRIC",
    )
    group.add_argument(
        "--num_caches",
        type=int,
        metavar="M",
        help=f"optimal: update steps of each block (default: {DEFAULT_NUM_CACHES}); threshold, instead of "
        "--cache_threshold: M updates in all, that is an interval of ceil(K / M)",
    )
    group.add_argument("--metric", help=f"optimal: similarity of the schedule (default: {DEFAULT_METRIC})")
    selection = group.add_mutually_exclusive_group()
    selection.add_argument(
        "--num_bu_blocks",
        type=int,
        metavar="N",
        help="optimal: blocks that bubbling union extends (default: 0)",
    )
    selection.add_argument(
        "--bu",
        dest="num_bu_blocks",
        action="store_const",
        const=DEFAULT_BU_BLOCKS,
        help=f"optimal: the same as --num_bu_blocks {DEFAULT_BU_BLOCKS}",
    )
    group.add_argument("--edit_steps", type=integers, metavar="0,20,40", help="edit: update steps of all blocks")
    add_engine_argument(group)
    return group


def add_engine_argument(parser: argparse._ActionsContainer) -> None:
    """--engine"""
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default=AUTO,
        help="what runs the schedule: auto, the fastest that can, of all but onednn; eager, layer by layer; onednn, "
        "likewise with oneDNN's products; fused, the whole denoising loop as one program; cuda_graph, as one CUDA "
        "graph. With --cache_mode original the last three are lossless "
        "(default: %(default)s)",
    )


def add_precision_argument(parser: argparse._ActionsContainer) -> None:
    """--precision"""
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="of the products with the weights of self-attention and feed-forward blocks, where an engine runs them in "
        "compiled code on the CPU (default: the policy's own)",
    )


def cache_request(args: argparse.Namespace, default_mode: str = "original") -> CacheRequest:
    """What the flags of `add_cache_arguments` ask for; of mode 'optimal' with all arguments, defaults included.

    Args:
        default_mode: the mode without --cache_mode and --optimal_steps_dir.

    Raises:
        ValueError: as `resolve_request`.
    """
    names = ("cache_threshold", "optimal_steps_dir", "num_caches", "metric", "num_bu_blocks", "edit_steps")
    given = {name: getattr(args, name) for name in names}
    request = resolve_request(args.cache_mode, given, default_mode=default_mode, harmless=OPTIMAL_DEFAULTS.items())
    if request.mode != "optimal":
        return request
    return CacheRequest(request.mode, {"num_caches": DEFAULT_NUM_CACHES, **OPTIMAL_DEFAULTS, **request.arguments})


def apply_request(policy: Any, request: CacheRequest, engine: str) -> Any:
    """Applies the cache that is asked for; returns the policy.

    Raises:
        ValueError, FileNotFoundError: as `FastDiffusionPolicy.apply_cache`.
    """
    return FastDiffusionPolicy.apply_cache(policy, cache_mode=request.mode, engine=engine, **request.arguments)


def path_argument(text: str) -> Path:
    """An argparse type: a path that every file and table of results can hold.

    Raises:
        argparse.ArgumentTypeError: it is empty, or has a line break, a NUL or a byte that is no UTF-8.
    """
    try:
        return Path(check_path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


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


def add_start_arguments(parser: argparse.ArgumentParser) -> None:
    """--demo_idx and --noise_seed: where an episode starts, and the sampling noise."""
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
        "--noise_seed",
        "--random_seed",
        type=int,
        default=DEFAULT_SEED,
        metavar="SEED",
        help=f"seed of the sampling noise (default: {DEFAULT_SEED})",
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """-o, -t, --cache_mode and --debug: which recording to read."""
    add_output_argument(parser, "assets directory")
    add_folder_argument(parser)
    parser.add_argument(
        "--cache_mode",
        type=path_argument,
        default="original",
        metavar="MODE",
        help="folder in OUT/TASK: original, threshold_5, optimal_cosine_caches_10, … (default: original)",
    )
    add_debug_argument(parser)


def run_assets(args: argparse.Namespace) -> RunAssets:
    """The directory that `add_run_arguments` names."""
    return RunAssets(args.output_dir / args.task / args.cache_mode)


def add_bacinfer_files_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bacinfer_files",
        action="store_true",
        help="write the results in the files that BACInfer reads, too: pickles, one for each block and number",
    )


def add_metrics_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--metrics",
        type=names,
        default=list(DEFAULT_METRICS),
        metavar="A,B",
        help=f"how to compare residuals: some of {', '.join(METRICS)} (default: {','.join(DEFAULT_METRICS)})",
    )
