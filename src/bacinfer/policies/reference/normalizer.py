"""Linear maps between data units (pixels, metres) and the policy's [-1, 1], as checkpoints store them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

# A channel that never changes would get an infinite scale; below this range it is only shifted to 0.
MIN_RANGE = 1e-4


class FieldNormalizer:
    """``x_normalised = x * scale + offset`` for one field, channel by channel."""

    def __init__(self, scale: torch.Tensor, offset: torch.Tensor) -> None:
        self.scale = scale
        self.offset = offset

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.scale) * self.scale + self.offset

    def unnormalize(self, x: torch.Tensor) -> torch.Tensor:
        return (x.to(self.scale) - self.offset) / self.scale


class LinearNormalizer(nn.Module):
    """One :class:`FieldNormalizer` per field, kept as ``params_dict.{field}.{scale, offset, input_stats.*}``."""

    def __init__(self) -> None:
        super().__init__()
        self.params_dict = nn.ParameterDict()

    @classmethod
    @torch.no_grad()
    def fit(cls, data: Mapping[str, torch.Tensor]) -> LinearNormalizer:
        """Map each channel's range in ``data`` (field: [..., channels]) to [-1, 1]."""
        normalizer = cls()
        for field, values in data.items():
            values = values.reshape(-1, values.shape[-1]).float()
            stats = {
                "min": values.min(dim=0).values,
                "max": values.max(dim=0).values,
                "mean": values.mean(dim=0),
                "std": values.std(dim=0),
            }
            normalizer._add_field(field, stats)
        return normalizer

    @classmethod
    def from_ranges(cls, ranges: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> LinearNormalizer:
        """Map [minimum, maximum] of each field's channels to [-1, 1]; mean and std are left out of the statistics."""
        normalizer = cls()
        for field, (minimum, maximum) in ranges.items():
            normalizer._add_field(field, {"min": minimum, "max": maximum})
        return normalizer

    def add_image(self, field: str) -> None:
        """Map a field of images from [0, 1] to [-1, 1]."""
        uniform = {"min": 0.0, "max": 1.0, "mean": 0.5, "std": 12**-0.5}
        self._add_field(field, {name: torch.tensor([value]) for name, value in uniform.items()})

    def _add_field(self, field: str, stats: dict[str, torch.Tensor]) -> None:
        width = stats["max"] - stats["min"]
        constant = width < MIN_RANGE
        scale = 2.0 / width.masked_fill(constant, 2.0)
        offset = torch.where(constant, -stats["min"], -1.0 - scale * stats["min"])
        self.params_dict[field] = _parameters({"scale": scale, "offset": offset, "input_stats": stats})

    def __getitem__(self, field: str) -> FieldNormalizer:
        fields = self.params_dict
        if field not in fields:
            known = ", ".join(fields) or "none: it was never fitted or loaded"
            raise RuntimeError(f"the normaliser has no field {field!r}; its fields: {known}")
        params = fields[field]
        return FieldNormalizer(params["scale"], params["offset"])

    def normalize(self, data: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {field: self[field].normalize(values) for field, values in data.items()}

    def unnormalize(self, data: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {field: self[field].unnormalize(values) for field, values in data.items()}

    def _load_from_state_dict(self, state_dict: Mapping[str, torch.Tensor], prefix: str, *_: Any) -> None:
        # Fields and statistics are whatever the checkpoint has. torch then fills them like any other children.
        root = prefix + "params_dict."
        tree: dict[str, Any] = {}
        for key, value in state_dict.items():
            if key.startswith(root):
                *parents, leaf = key[len(root) :].split(".")
                node = tree
                for parent in parents:
                    node = node.setdefault(parent, {})
                node[leaf] = value.clone()
        self.params_dict = _parameters(tree)


def _parameters(tree: Mapping[str, Any]) -> nn.ParameterDict:
    parameters = nn.ParameterDict()
    for key, value in tree.items():  # one by one: the constructor would sort them
        parameters[key] = nn.Parameter(value, requires_grad=False) if torch.is_tensor(value) else _parameters(value)
    return parameters
