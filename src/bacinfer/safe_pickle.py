"""Unpickling that can build named kinds of data and run nothing else.

A pickle is a program: it may import any function and call it. The unpickler here resolves only the names that it is
given, so that reading a file from somewhere else cannot run code.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from typing import IO, Any, ClassVar

import numpy as np
import torch

Allowed = Mapping[tuple[str, str], Any]


class UnsafePickleError(ValueError):
    """A pickle asks for something that was not admitted."""


class RestrictedUnpickler(pickle._Unpickler):
    """Resolves ``(module, name)`` through ``allowed``, which may put a harmless object in the place of the real one.

    It is the standard library's Python implementation, because the C one offers no hook for BUILD: a pickle may
    set attributes of any object that it can name, and must not do so to shared classes and functions.
    """

    dispatch: ClassVar[dict] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: IO[bytes], allowed: Allowed, **settings: Any) -> None:
        super().__init__(file, **settings)
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise UnsafePickleError(
                f"it asks for {module}.{name}, which is not among the data types that are read"
            ) from None

    def load_build(self) -> None:
        target = self.stack[-2]  # type: ignore[attr-defined]
        if callable(target):
            raise UnsafePickleError(f"it tries to change {target!r}")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build


def load(file: IO[bytes], allowed: Allowed) -> Any:
    """Unpickle ``file``, admitting ``allowed``.

    Raises:
        UnsafePickleError: names the first thing that is not admitted.
    """
    return RestrictedUnpickler(file, allowed).load()


def _encode_latin1(text: str, encoding: str) -> bytes:
    """Bytes in old pickle protocols; other codecs have no place there."""
    if encoding not in ("latin1", "latin-1"):
        raise UnsafePickleError(f"it asks for the codec {encoding!r}")
    return text.encode("latin-1")


def _load_storage(data: bytes) -> Any:
    """A tensor's storage inside a plain pickle is a nested torch file."""
    return torch.load(io.BytesIO(data), weights_only=True)


_DTYPES = {
    ("torch", str(value).removeprefix("torch.")): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}

TENSOR_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch.storage", "_load_from_bytes"): _load_storage,
    **_DTYPES,
}


def _numpy_globals() -> dict[tuple[str, str], Any]:
    # ask numpy's own pickles for its functions: their module changed its name in numpy 2
    reconstruct = np.empty(0).__reduce__()[0]
    scalar = np.float32(0).__reduce__()[0]
    from_buffer = np.empty(0).__reduce_ex__(5)[0]
    names: dict[tuple[str, str], Any] = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
    for package in ("numpy.core", "numpy._core"):
        names[f"{package}.multiarray", "_reconstruct"] = reconstruct
        names[f"{package}.multiarray", "scalar"] = scalar
        names[f"{package}.numeric", "_frombuffer"] = from_buffer
    return names


ARRAY_GLOBALS: dict[tuple[str, str], Any] = {**_numpy_globals(), ("_codecs", "encode"): _encode_latin1}
