"""Noticing that a policy has changed since a program was made of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter, eq
from typing import Any

import torch
from torch import Tensor, nn

from bacinfer.core.engines.loops import Loop

NUM_PARTS = 64
"""Calls within which any write to a weight is found."""

_NUM_PEEKED_VALUES = 4  # of each matrix, at every call
_LARGE = 1 << 12  # bytes whose comparison takes longer than its call
_MODULE_METHODS = ("__call__", "_call_impl", "forward", "_sa_block", "_mha_block", "_ff_block", "_rotate_half")
_METHODS = ("step", "set_timesteps", "_get_variance", "previous_timestep")  # of schedulers
_VERSION = attrgetter("_version")
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes to what is compared bit by bit


class PolicyWatch:
    """Remembers the model and the noise scheduler of a denoising loop as they are.

    Seen at the next call are: another module, parameter, buffer or scheduler; another class of one; any attribute of a
    module (``norm_first``, ``eps``, a method that was replaced) and its hooks; methods of the classes; writes that
    PyTorch counts (those of optimisers, `load_state_dict`, every operation in place); other storage (``.to(...)``).
    Writes through ``tensor.data`` or NumPy leave no such trace. Of those, what changes the middle of a weight matrix is
    seen at the next call too, and anything else within `NUM_PARTS` calls, as each call compares another part of all
    weights with a copy.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop, self._owner_class, self._model = loop, type(loop.owner), loop.model
        self._scheduler = loop.scheduler
        self._modules = list(self._model.modules())
        self._classes = self._read_classes()
        self._methods = list(_methods({self._owner_class, *self._classes}))
        self._methods += [(self._owner_class, name, getattr(self._owner_class, name)) for name in loop.functions]
        self._dicts = list(_dicts_of(self._modules))
        self._dicts_before = [dict(entries) for entries in self._dicts]
        self._settings_before = loop.settings()

        tensors = [
            tensor
            for module in self._modules
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        ]
        self._counted = [tensor for tensor in tensors if not tensor.is_inference()]
        self._versions, self._tensors, self._addresses = self._read_versions(), tensors, _addresses(tensors)
        matrices = [_middle(_bits(tensor)) for tensor in tensors if tensor.ndim >= 2]
        self._peeked = _alike([*matrices, *map(_bits, _coefficients(self._settings_before))])
        self._peeked_before = _copied(self._peeked)
        self._parts = [_alike(part) for part in _split([_bits(tensor) for tensor in tensors], NUM_PARTS)]
        self._parts_before = [_copied(part) for part in self._parts]
        self._next_part = 0

    @property
    def num_bytes(self) -> int:
        """Memory of the copies."""
        return sum(bits.nbytes for part in self._parts_before for bits in part)

    def unchanged(self) -> bool:
        """Whether all of it is still the same, as far as this call can tell."""
        if self._loop.model is not self._model or self._loop.scheduler is not self._scheduler:
            return False
        part, self._next_part = self._next_part, (self._next_part + 1) % len(self._parts)
        return (
            type(self._loop.owner) is self._owner_class
            and self._read_classes() == self._classes
            and all(getattr(owner, name) is method for owner, name, method in self._methods)
            and _all_equal(self._dicts, self._dicts_before)
            and _all_equal([self._loop.settings()], [self._settings_before])
            and self._read_versions() == self._versions
            and _addresses(self._tensors) == self._addresses
            and all(map(torch.equal, _joined(self._peeked), self._peeked_before))
            and all(map(torch.equal, _joined(self._parts[part]), self._parts_before[part]))
        )

    def _read_classes(self) -> list[type]:
        return [*map(type, self._modules), type(self._scheduler)]

    def _read_versions(self) -> list[int]:
        return list(map(_VERSION, self._counted))


def _methods(classes: set[type]) -> Iterator[tuple[type, str, Any]]:
    for owner in classes:
        for name in (*_METHODS, *(_MODULE_METHODS if issubclass(owner, nn.Module) else ())):
            if hasattr(owner, name):
                yield owner, name, getattr(owner, name)


def _dicts_of(modules: Sequence[nn.Module]) -> Iterator[dict[Any, Any]]:
    """What a module computes with, but for the values of tensors: attributes, children, tensors and hooks."""
    for module in modules:
        yield vars(module)
        yield module._modules
        yield module._parameters
        yield module._buffers
        yield module._forward_hooks
        yield module._forward_pre_hooks
    yield nn.modules.module._global_forward_hooks
    yield nn.modules.module._global_forward_pre_hooks


def _all_equal(found: Sequence[dict[Any, Any]], expected: Sequence[dict[Any, Any]]) -> bool:
    try:
        return all(map(eq, found, expected))  # of equal keys, what is identical counts as equal
    except (RuntimeError, ValueError):  # tensors and arrays, compared with others than themselves
        return False


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _coefficients(settings: dict[str, Any]) -> list[Tensor]:
    """A scheduler's own tables, such as `alphas_cumprod`."""
    return [value for value in settings.values() if isinstance(value, Tensor) and value.ndim == 1]


def _middle(bits: Tensor) -> Tensor:
    """A few entries from the middle of a matrix, in its storage."""
    while bits.ndim > 1:
        bits = bits[len(bits) // 2]
    start = max(0, (len(bits) - _NUM_PEEKED_VALUES) // 2)
    return bits[start : start + _NUM_PEEKED_VALUES]


def _bits(tensor: Tensor) -> Tensor:
    """A tensor's own storage as integers, flat where it lies in one piece: numbers that are none are equal too."""
    bits = tensor.detach().view(_INTEGERS.get(tensor.element_size(), tensor.dtype))
    return bits.view(-1) if bits.is_contiguous() else bits


def _alike(views: Sequence[Tensor]) -> list[list[Tensor]]:
    """The views that one comparison takes together: small ones, and on a GPU, where each is waited for, all."""
    groups: dict[Any, list[Tensor]] = {}
    for i, view in enumerate(views):
        alone = view.device.type == "cpu" and view.nbytes > _LARGE
        groups.setdefault((view.dtype, view.device, i if alone else None), []).append(view)
    return list(groups.values())


def _joined(groups: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Each group as one tensor, without a copy of what is one."""
    return [views[0] if len(views) == 1 else torch.cat(list(map(_flat, views))) for views in groups]


def _flat(view: Tensor) -> Tensor:
    return view if view.ndim == 1 else view.reshape(-1)


def _copied(groups: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [joined.clone() for joined in _joined(groups)]


def _split(tensors: Sequence[Tensor], num_parts: int) -> list[list[Tensor]]:
    """Views of all of the tensors, in parts of about equal size."""
    room = size = -(-sum(tensor.nbytes for tensor in tensors) // num_parts)
    parts: list[list[Tensor]] = [[]]
    for tensor in tensors:
        start = 0
        while start < len(tensor):
            if room <= 0:
                parts.append([])
                room = size
            end = min(len(tensor), start + -(-room // tensor[0].nbytes))
            parts[-1].append(tensor[start:end])
            room -= parts[-1][-1].nbytes
            start = end
    return parts
