"""``bacinfer train``: a policy from demonstrations."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from bacinfer.commands.options import add_debug_argument, path_argument, run_command
from bacinfer.training.configuration import read_config
from bacinfer.training.demonstrations import load_demonstrations
from bacinfer.training.trainer import Trainer
from bacinfer.training.weights import export_checkpoint

_DATA_HELP = (
    "demonstrations: an .npz file, or a folder published at https://diffusion-policy.cs.columbia.edu/data/training/, "
    "pusht_cchi_v7_replay.zarr or, for task=block_pushing, multimodal_push_seed.zarr; block_pushing_expert and the "
    "robot arm's tasks record their own if they are not there (default: task.dataset's)"
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train a transformer diffusion policy on demonstrations. Running the same command again continues "
        "an interrupted run.",
    )
    parser.add_argument(
        "-o", "--output_dir", required=True, type=path_argument, help="folder of the run: checkpoints, log"
    )
    parser.add_argument("--data", type=path_argument, help=_DATA_HELP)
    parser.add_argument(
        "--init_from", type=path_argument, metavar="FILE", help="start from the weights of a .ckpt or .safetensors file"
    )
    parser.add_argument(
        "--export",
        type=path_argument,
        metavar="CKPT",
        help="do not train; write the run's weights to this small checkpoint",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="processor threads (default: all cores)")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="changes of training/config/train.yaml, such as task=assembly"
    )
    add_debug_argument(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(_run, build_parser(), argv)


def _run(args: argparse.Namespace) -> int:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.export is not None:
        export_checkpoint(args.output_dir / "checkpoints" / "latest.ckpt", args.export)
        return 0
    cfg = read_config(args.overrides)
    trainer = Trainer(cfg, load_demonstrations(cfg, args.data), args.output_dir, args.init_from)
    if trainer.global_step:
        print(f"continuing from {trainer.latest_path}, step {trainer.global_step}", file=sys.stderr)
    if not trainer.run():
        raise KeyboardInterrupt
    return 0


if __name__ == "__main__":
    sys.exit(main())
