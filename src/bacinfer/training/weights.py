"""The weights that a training run starts from, and those that it hands on."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch

from bacinfer import files
from bacinfer.policies import read_checkpoint, write_checkpoint
from bacinfer.policies.checkpoint import acting_weights, in_precision
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
    """Write a small checkpoint with the acting weights of ``source`` alone, the networks' in half precision, deflated.

    On Push-T the rounding moves actions by 0.02 pixels (RMS), where another noise draw moves them by tens. Image
    encoders, the largest part of policies that have one, are in bfloat16: its exponents deflate by a fifth, half
    precision's mantissas hardly. The normaliser keeps single precision: it maps pixels.
    """
    checkpoint = read_checkpoint(source)
    weights = in_precision(acting_weights(checkpoint), _small)
    # both names refer to the same tensors, which the file holds once
    states = {"model": weights, "ema_model": weights}
    progress = {name: checkpoint.progress(name) for name in ("global_step", "epoch")}
    with files.atomic_write(path) as temporary:
        write_checkpoint(temporary, checkpoint.cfg, states, progress)
        _deflate(temporary)


def _small(name: str, weight: torch.Tensor) -> torch.dtype:
    if name.startswith("model."):
        return torch.float16
    return torch.bfloat16 if name.startswith("obs_encoder.") else weight.dtype


def _deflate(path: Path) -> None:
    """Compress the entries of an archive of ``torch.save``, which ``torch.load`` reads as well."""
    with (
        files.atomic_write(path) as smaller,
        zipfile.ZipFile(path) as source,
        zipfile.ZipFile(smaller, "w") as target,
    ):
        for name in source.namelist():
            target.writestr(zipfile.ZipInfo(name), source.read(name), zipfile.ZIP_DEFLATED, compresslevel=9)
