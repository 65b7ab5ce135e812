"""What every module of a Diffusion Policy checkpoint has in common."""

from __future__ import annotations

import torch
from torch import nn


class PlacedModule(nn.Module):
    """A module that knows its device and dtype.

    The empty parameter carries no numbers: Diffusion Policy's modules have it, so its name is in every checkpoint.
    """

    def __init__(self) -> None:
        super().__init__()
        self._dummy_variable = nn.Parameter()

    @property
    def device(self) -> torch.device:
        return self._dummy_variable.device

    @property
    def dtype(self) -> torch.dtype:
        return self._dummy_variable.dtype
