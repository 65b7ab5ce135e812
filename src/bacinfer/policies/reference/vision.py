"""robomimic's observation encoder (Mandlekar et al., 2021) as Diffusion Policy builds it, under the names of its
checkpoints: a ResNet-18 with spatial softmax for each camera, everything else as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

KEYPOINTS = 32
FEATURES = 64
CHANNELS_PER_GROUP = 16


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut (He et al., 2016)."""

    def __init__(self, channels: int, out_channels: int, stride: int, group_norm: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = _norm(out_channels, group_norm)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = _norm(out_channels, group_norm)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, out_channels, 1, stride, bias=False), _norm(out_channels, group_norm)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class ResNet18(nn.Module):
    """Images [B, C, H, W] to features [B, 512, H / 32, W / 32], rounded up."""

    def __init__(self, channels: int, group_norm: bool) -> None:
        super().__init__()
        stem = [
            nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False),
            _norm(64, group_norm),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        ]
        stages = [
            nn.Sequential(BasicBlock(width_in, width, stride, group_norm), BasicBlock(width, width, 1, group_norm))
            for width_in, width, stride in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))
        ]
        self.nets = nn.Sequential(*stem, *stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.nets(images)


class SpatialSoftmax(nn.Module):
    """Features [B, C, H, W] to the mean positions [B, KEYPOINTS, 2] of as many softmax distributions over the image, x
    and y from -1 to 1 (Finn et al., 2016)."""

    temperature: torch.Tensor
    pos_x: torch.Tensor
    pos_y: torch.Tensor

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.nets = nn.Conv2d(channels, KEYPOINTS, 1)
        y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        self.register_buffer("temperature", torch.ones(1))
        self.register_buffer("pos_x", x.reshape(1, -1))
        self.register_buffer("pos_y", y.reshape(1, -1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        attention = F.softmax(self.nets(features).flatten(2) / self.temperature, dim=-1)  # [B, KEYPOINTS, H W]
        return torch.stack([(self.pos_x * attention).sum(-1), (self.pos_y * attention).sum(-1)], dim=-1)


class ImageEncoder(nn.Module):
    """Images [B, C, H, W] to [B, FEATURES]. In checkpoints, backbone and pool have their names in `nets` as well."""

    def __init__(self, channels: int, height: int, width: int, group_norm: bool) -> None:
        super().__init__()
        self.backbone = ResNet18(channels, group_norm)
        self.pool = SpatialSoftmax(512, -(-height // 32), -(-width // 32))
        self.nets = nn.Sequential(self.backbone, self.pool, nn.Flatten(), nn.Linear(2 * KEYPOINTS, FEATURES))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.nets(images)


class ObservationEncoder(nn.Module):
    """Observations, normalised, to one vector each: the keys' features in the order of `shapes`.

    Args:
        shapes: of each key, ``{"shape": […], "type": "rgb" or "low_dim" (the default)}``; images are [C, H, W].
        crop_shape: height and width of what the cameras' networks see; ``None``: all of an image.
        fixed_crop: the centre is cropped in evaluation mode; without, a random part also there.
        group_norm: normalise groups of channels; without, the batch.

    Attributes:
        output_dim: the width of the vector.

    Raises:
        ValueError: an observation of another type, or an image that is no larger than the crop.
    """

    def __init__(
        self,
        shapes: Mapping[str, Mapping[str, Any]],
        crop_shape: Sequence[int] | None,
        fixed_crop: bool,
        group_norm: bool,
    ) -> None:
        super().__init__()
        self.shapes = {key: tuple(spec["shape"]) for key, spec in shapes.items()}
        self.crop_shape = None if crop_shape is None else (crop_shape[0], crop_shape[1])
        self.fixed_crop = fixed_crop
        self.obs_nets = nn.ModuleDict()
        for key, spec in shapes.items():
            kind = spec.get("type", "low_dim")
            if kind not in ("rgb", "low_dim"):
                raise ValueError(f"observation {key!r} is of type {kind!r}; known: rgb, low_dim")
            if kind == "rgb":
                self.obs_nets[key] = self._image_encoder(key, group_norm)
        self.output_dim = sum(
            FEATURES if key in self.obs_nets else torch.Size(shape).numel() for key, shape in self.shapes.items()
        )

    def _image_encoder(self, key: str, group_norm: bool) -> ImageEncoder:
        channels, height, width = self.shapes[key]
        if self.crop_shape is not None:
            if height <= self.crop_shape[0] or width <= self.crop_shape[1]:
                raise ValueError(
                    f"{key!r} is an image of {height} × {width}, no larger than crop_shape {self.crop_shape}"
                )
            height, width = self.crop_shape
        return ImageEncoder(channels, height, width, group_norm)

    def forward(self, obs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """``{key: [B, *shape]}`` to [B, output_dim]."""
        features = [
            F.relu(self.obs_nets[key](self._crop(obs[key]))) if key in self.obs_nets else obs[key].flatten(1)
            for key in self.shapes
        ]
        return torch.cat(features, dim=-1)

    def _crop(self, images: torch.Tensor) -> torch.Tensor:
        if self.crop_shape is None:
            return images
        height, width = self.crop_shape
        spare_rows, spare_columns = images.shape[-2] - height, images.shape[-1] - width
        if self.fixed_crop and not self.training:
            top, left = round(spare_rows / 2), round(spare_columns / 2)
            return images[..., top : top + height, left : left + width]
        # drawn on the CPU, and never the last place, as where the checkpoints were trained
        tops = (spare_rows * torch.rand(len(images))).long().to(images.device)
        lefts = (spare_columns * torch.rand(len(images))).long().to(images.device)
        places = images.unfold(-2, height, 1).unfold(-2, width, 1)  # [B, C, top, left, height, width]
        return places[torch.arange(len(images), device=images.device), :, tops, lefts]


def _norm(channels: int, group_norm: bool) -> nn.Module:
    return nn.GroupNorm(channels // CHANNELS_PER_GROUP, channels) if group_norm else nn.BatchNorm2d(channels)
