"""Writes a checkpoint of Push-T's policy in another size with random weights: speed does not depend on their values.

python benchmarks/untrained.py 256 n256.ckpt   # the published size
bacinfer bench -c n256.ckpt
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bacinfer.policies import Checkpoint
from bacinfer.policies.checkpoint import create_policy
from bacinfer.policies.reference import LinearNormalizer
from bacinfer.training.configuration import read_config
from bacinfer.training.weights import write_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("n_emb", type=int, help="width of its tokens")
    parser.add_argument("path", type=Path, help="where the checkpoint goes")
    args = parser.parse_args()
    torch.manual_seed(0)
    cfg = read_config([f"policy.model.n_emb={args.n_emb}"])
    policy = create_policy(Checkpoint(args.path, cfg, {}))
    units = {name: (torch.zeros(width), torch.full((width,), 512.0)) for name, width in (("obs", 20), ("action", 2))}
    policy.set_normalizer(LinearNormalizer.from_ranges(units))
    weights = policy.state_dict()
    write_checkpoint(args.path, cfg, {"model": weights, "ema_model": weights}, {"global_step": 0, "epoch": 0})


if __name__ == "__main__":
    main()
