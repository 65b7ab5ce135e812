"""The weights of a product, in the orders and the precisions in which programs read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from bacinfer.core.engines.fused import huge_pages


@dataclass(frozen=True, eq=False)
class Affine:
    """``x @ weight.T + bias``; the weight [out, in] as `nn.Linear` has it, and in the orders in which programs read it.

    Those are laid out at their first use, which is when a program is compiled or first run.
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Affine:
        weight = weight.detach()
        bias = weight.new_zeros(len(weight)) if bias is None else bias.detach()
        return cls(weight.to(dtype), bias.to(dtype))

    @cached_property
    def columns(self) -> Tensor:
        """The weight as [in, out]: a product of few rows is faster with it."""
        return self.weight.t().contiguous()

    def panels(self, width: int, precision: str | None = None) -> Tensor:
        """Panels of `width` outputs [out / width, n, width], padded with 0: each its part of the bias, then the weight.

        Args:
            precision: Of the weight. None: single, and n = 1 + in; "bf16": two inputs in the place of one number,
                n = 1 + in / 2; "int8": after a row of units (see `in_bytes`) four of them, n = 2 + in / 4.
        """
        if (width, precision) not in self._panels:
            padding = -len(self.weight) % width
            weight, rows = self.weight, [self.bias]
            if precision == "bf16":
                weight = F.pad(weight, (0, weight.shape[1] % 2)).to(torch.bfloat16).view(torch.float32)
            elif precision == "int8":
                weight, units = in_bytes(weight)
                rows.append(units)
                # without a sign, as processors multiply them
                weight = F.pad((weight + 128).to(torch.uint8), (0, -weight.shape[1] % 4), value=128).view(torch.float32)
            weight = F.pad(weight, (0, 0, 0, padding)).view(-1, width, weight.shape[1]).transpose(1, 2)
            head = F.pad(torch.stack(rows), (0, padding)).view(len(rows), -1, width).transpose(0, 1)
            self._panels[width, precision] = torch.cat([head, weight], dim=1).contiguous()
        return self._panels[width, precision]

    @cached_property
    def _panels(self) -> dict[tuple[int, str | None], Tensor]:
        return {}

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.addmm(self.bias, x, self.columns, out=out)


def in_bytes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127 [out, in], and the units [out] of which a row is so many: the largest is 127."""
    units = weight.abs().amax(1) / 127
    return torch.where(units[:, None] > 0, weight / units[:, None], 0).round(), units


def join_panels(affines: Sequence[tuple[Affine, str | None]], width: int) -> None:
    """Moves the panels of all, each in its precision, to one piece of memory, in their order, if they are not there
    yet."""
    if all((width, precision) in affine._panels for affine, precision in affines):
        return
    memory = huge_pages.empty(sum(affine.panels(width, precision).numel() for affine, precision in affines))
    start = 0
    for affine, precision in affines:
        panels = affine.panels(width, precision)
        affine._panels[width, precision] = memory[start : start + panels.numel()].view(panels.shape).copy_(panels)
        start += panels.numel()
