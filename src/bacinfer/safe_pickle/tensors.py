"""PyTorch's tensors in pickles: what the names in them stand for."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any

import torch

from bacinfer.safe_pickle.limits import are_sizes, is_size, memory_limit, require, shorten
from bacinfer.safe_pickle.machine import RestrictedUnpickler


@dataclass(frozen=True)
class Storage:
    """The memory of tensors of one dtype."""

    memory: torch.UntypedStorage
    dtype: torch.dtype


@dataclass(frozen=True)
class StorageId:
    """How a pickle refers to a storage, whose bytes lie outside of it."""

    key: str
    dtype: torch.dtype
    size: int  # in bytes

    @classmethod
    def parse(cls, found: Any) -> StorageId:
        """From a persistent id: 'storage', storage class, key, device and number of elements; then None in old files.

        Raises:
            UnsafePickleError: it is none.
        """
        require(type(found) is tuple and len(found) in (5, 6) and found[0] == "storage", "a reference to no storage")
        _, dtype, key, _, length, *view = found
        known = isinstance(dtype, torch.dtype) and type(key) is str and view in ([], [None])
        require(known and is_size(length), "a storage of a kind that is not known")
        return cls(key, dtype, length * dtype.itemsize)


def _tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> torch.Tensor:
    """A view of a storage that shows each of its elements at most once."""
    require(isinstance(storage, Storage) and not hooks and not metadata, "a tensor that is not plain")
    require(are_sizes(shape) and are_sizes(strides) and is_size(offset) and len(shape) == len(strides), "no tensor")
    held = storage.memory.nbytes() // storage.dtype.itemsize
    end = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1
    fits = math.prod(shape) <= held and (end <= held or 0 in shape) and offset <= held
    require(fits, f"a tensor of {shorten(tuple(shape))} from element {offset} on in a storage of {held}")
    tensor = torch.empty(0, dtype=storage.dtype).set_(storage.memory, offset, tuple(shape), tuple(strides))
    return tensor.requires_grad_(requires_grad is True)


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> torch.nn.Parameter:
    require(isinstance(data, torch.Tensor) and not hooks, "a parameter that is no tensor")
    return torch.nn.Parameter(data, requires_grad is True)


def _shape(sizes: Any) -> torch.Size:
    require(are_sizes(sizes), "a shape that is none")
    return torch.Size(sizes)


def _ordered_dict() -> dict:
    return {}


class _StorageUnpickler(RestrictedUnpickler):
    def persistent_load(self, pid: Any) -> StorageId:
        return StorageId.parse(pid)


def _load_storage(data: Any) -> Storage:
    """A tensor's storage inside a plain pickle: a file of its own, in the format of PyTorch before 1.6.

    It is a row of pickles (magic number, version, machine, reference to the storage, its key), the storage's length in
    eight bytes, and its elements.
    """
    require(type(data) is bytes, "a storage without data")
    file = io.BytesIO(data)
    limit = memory_limit(len(data))
    magic, _, machine, found, keys = (_StorageUnpickler(file, _STORAGE_CLASSES, limit).load() for _ in range(5))
    require(magic == 0x1950A86A20F9469CFC6C and machine["little_endian"] is True, "a storage of another format")
    require(isinstance(found, StorageId) and keys == [found.key], "another number of storages than one")
    file.read(8)
    elements = bytearray(file.read())
    require(len(elements) == found.size, "a storage of another size than its data")
    # frombuffer takes no empty buffer
    memory = torch.frombuffer(elements, dtype=torch.uint8) if elements else torch.empty(0, dtype=torch.uint8)
    return Storage(memory.untyped_storage(), found.dtype)


_STORAGE_CLASSES: dict[tuple[str, str], Any] = {
    ("torch", f"{name}Storage"): dtype
    for name, dtype in {
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Float": torch.float32,
        "Double": torch.float64,
        "ComplexFloat": torch.complex64,
        "ComplexDouble": torch.complex128,
        "Char": torch.int8,
        "Short": torch.int16,
        "Int": torch.int32,
        "Long": torch.int64,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}
_DTYPES: dict[tuple[str, str], Any] = {
    ("torch", str(dtype).removeprefix("torch.")): dtype for dtype in _STORAGE_CLASSES.values()
}

TENSOR_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch", "Size"): _shape,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "_load_from_bytes"): _load_storage,
    **_STORAGE_CLASSES,
    **_DTYPES,
}
