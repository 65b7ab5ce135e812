"""Training a policy on demonstrations: ``bacinfer train``, ``scripts/train_pusht.py``, ``scripts/train_arm.py``."""

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

_DATA_HELP = {
    "train_pusht": "demonstrations: an .npz file, or a folder published at "
    "https://diffusion-policy.cs.columbia.edu/data/training/, pusht_cchi_v7_replay.zarr or, for task=block_pushing, "
    "multimodal_push_seed.zarr; task=block_pushing_expert records its own if they are not there (default: in "
    "data/pusht or data/block_pushing)",
    "train_arm": "demonstrations: an .npz file; recorded if it is not there (default: data/metaworld/TASK.npz)",
}


def build_parser(config: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train a transformer diffusion policy on demonstrations. Running the same command again continues "
        "an interrupted run.",
    )
    parser.add_argument(
        "-o", "--output_dir", required=True, type=path_argument, help="folder of the run: checkpoints, log"
    )
    parser.add_argument("--data", type=path_argument, help=_DATA_HELP[config])
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
        "overrides", nargs="*", metavar="KEY=VALUE", help=f"entries of training/config/{config}.yaml to change"
    )
    add_debug_argument(parser)
    return parser


def main(argv: Sequence[str] | None = None, config: str = "train_pusht") -> int:
    return run_command(lambda args: _run(args, config), build_parser(config), argv)


def _run(args: argparse.Namespace, config: str) -> int:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.export is not None:
        export_checkpoint(args.output_dir / "checkpoints" / "latest.ckpt", args.export)
        return 0
    cfg = read_config(args.overrides, config)
    trainer = Trainer(cfg, load_demonstrations(cfg, args.data), args.output_dir, args.init_from)
    if trainer.global_step:
        print(f"continuing from {trainer.latest_path}, step {trainer.global_step}", file=sys.stderr)
    if not trainer.run():
        raise KeyboardInterrupt
    return 0


if __name__ == "__main__":
    sys.exit(main())
