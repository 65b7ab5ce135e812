"""Noticing that a model's weights have changed since they were packed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_NUM_WATCHED_VALUES = 4  # of each tensor


class WeightWatch:
    """Remembers a model's modules, parameters and buffers as they are.

    What changes them is seen in the cheapest way that shows it: another module or tensor by its identity, a write by
    the tensor's version counter, other storage (`.to(...)`) by its address. Writes through ``tensor.data`` leave no
    such trace, so a few values of each tensor are compared too.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._model = model
        self._children = [(module._modules, dict(module._modules)) for module in modules]
        self._tensors = [
            (tensors, name, tensor, _version(tensor), tensor.data_ptr())
            for module in modules
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
            if tensor is not None
        ]
        watched = [tensor.detach() for _, _, tensor, _, _ in self._tensors if tensor.is_floating_point()]
        dtypes = {tensor.dtype for tensor in watched}
        self._views = [[_middle(tensor) for tensor in watched if tensor.dtype == dtype] for dtype in dtypes]
        self._values = self._read()

    def unchanged(self, model: nn.Module) -> bool:
        """Whether `model` is still the same, with all that it had."""
        return (
            model is self._model
            and all(children == before for children, before in self._children)
            and all(
                tensors.get(name) is tensor and _version(tensor) == version and tensor.data_ptr() == address
                for tensors, name, tensor, version, address in self._tensors
            )
            and all(map(torch.equal, self._read(), self._values))
        )

    def _read(self) -> list[Tensor]:
        return [torch.cat(views) for views in self._views]


def _middle(tensor: Tensor) -> Tensor:
    """A few entries from the middle of a tensor, in its storage."""
    flat = tensor.view(-1) if tensor.is_contiguous() else tensor[(0,) * (tensor.ndim - 1)]
    start = max(0, (len(flat) - _NUM_WATCHED_VALUES) // 2)
    return flat[start : start + _NUM_WATCHED_VALUES]


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
