"""The eager engine with oneDNN's products: large ones with weights, for policies that no program was written for.

On a CPU, PyTorch multiplies single precision by MKL, which leaves a third of some processors' speed unused (AMD's, for
instance), and oneDNN does not. It comes with PyTorch, and multiplies with the weights as they lie there, so that
nothing is kept of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from bacinfer.core.blocks import Block
from bacinfer.core.engines.base import Phase
from bacinfer.core.engines.eager import EagerEngine
from bacinfer.core.engines.fused.program_cache import dtype_of_products

MIN_ROWS, MIN_WEIGHTS = 64, 1 << 19
"""Smaller products are not always faster (`benchmarks/products.py`)."""


class OneDnnProducts(TorchFunctionMode):
    """Inside, large linear maps in single precision are oneDNN's, where nothing is differentiated."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.linear:
            return _linear(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


class OneDnnEngine(EagerEngine):
    """The eager engine, up to rounding.

    Raises:
        ValueError: the policy is not on a CPU, or this PyTorch has no oneDNN.
        RuntimeError: at sampling, as `EagerEngine`.
    """

    name: ClassVar[str] = "onednn"
    products = OneDnnProducts

    def __init__(self, policy: Any, blocks: Sequence[Block], phases: Sequence[Phase]) -> None:
        super().__init__(policy, blocks, phases)
        device = next(self.handle.model.parameters()).device
        if device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            raise ValueError(
                f"engine {self.name!r} cannot run this policy on {device.type} with PyTorch {torch.__version__}: it "
                f"needs a CPU, and oneDNN in PyTorch. engine='eager' can"
            )


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not _is_for_onednn(input, weight, bias):
        return F.linear(input, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")


def _is_for_onednn(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    tensors = [input, weight] if bias is None else [input, weight, bias]
    return (
        weight.numel() >= MIN_WEIGHTS
        and input.numel() >= MIN_ROWS * input.shape[-1]
        and all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
        and all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
        and weight.is_contiguous()
        and dtype_of_products(weight) == torch.float32  # autocast
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    )
