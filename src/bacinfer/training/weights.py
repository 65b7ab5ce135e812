"""The weights that a training run starts from, and those that it hands on."""

from __future__ import annotations

from pathlib import Path

import torch

from bacinfer.policies import read_checkpoint, write_checkpoint
from bacinfer.policies.checkpoint import acting_weights
from bacinfer.policies.reference import LinearNormalizer


def read_initial_weights(path: Path) -> dict[str, torch.Tensor]:
    """A policy's weights and normaliser to start from: a checkpoint's acting weights, or a ``.safetensors`` file.

    The latter has the model's own parameter names, and the ranges ``stats.{obs,action}_{min,max}`` that map to [-1, 1].
    """
    if path.suffix != ".safetensors":
        return acting_weights(read_checkpoint(path))
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    from safetensors.torch import load_file

    tensors = load_file(path)
    try:
        ranges = {
            name: (tensors.pop(f"stats.{name}_min"), tensors.pop(f"stats.{name}_max")) for name in ("obs", "action")
        }
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}: the range of the data that maps to [-1, 1]") from error
    normalizer = LinearNormalizer.from_ranges(ranges).state_dict(prefix="normalizer.")
    empty = torch.zeros(0)
    dummies = {"_dummy_variable": empty, "mask_generator._dummy_variable": empty}
    return {f"model.{name}": value for name, value in tensors.items()} | normalizer | dummies


def export_checkpoint(source: Path, path: Path) -> None:
    """Write a small checkpoint with the acting weights of ``source`` alone, the networks' in half precision.

    On Push-T the rounding moves actions by 0.02 pixels (RMS), where another noise draw moves them by tens. The
    normaliser keeps single precision: it maps pixels.
    """
    checkpoint = read_checkpoint(source)
    halves: dict[tuple[int, torch.Size], torch.Tensor] = {}  # weights with two names stay one

    def half(weight: torch.Tensor) -> torch.Tensor:
        return halves.setdefault((weight.data_ptr(), weight.shape), weight.half())

    weights = {
        name: half(value) if name.startswith(("model.", "obs_encoder.")) else value
        for name, value in acting_weights(checkpoint).items()
    }
    # both names refer to the same tensors, which the file holds once
    states = {"model": weights, "ema_model": weights}
    progress = {name: checkpoint.progress(name) for name in ("global_step", "epoch")}
    write_checkpoint(path, checkpoint.cfg, states, progress)
