"""Bytes and NumPy arrays in pickles: what the names in them stand for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bacinfer.safe_pickle.limits import are_sizes, require, shorten
from bacinfer.safe_pickle.records import Mentioned


def _encode(text: str, encoding: str) -> bytes:
    """Bytes in protocol 2; other codecs have no place there."""
    require(encoding in ("latin1", "latin-1"), f"text in the codec {shorten(encoding)}")
    return text.encode("latin-1")


def _no_bytes() -> bytes:
    """Empty bytes in protocol 2; with an argument this would make any number of them."""
    return b""


_NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
_DTYPE_STATES = [(3, order, None, None, None, -1, -1, 0) for order in ("<", "|")]
_NDARRAY = Mentioned()


def _dtype(code: str, align: bool = False, copy: bool = False) -> np.dtype:
    require(code in _NUMBERS, f"an array of dtype {shorten(code)}, expected numbers")
    return np.dtype(code)


def check_dtype_state(state: Any) -> None:
    # numpy would take fields and flags from it, and so believe that numbers are pointers
    require(state in _DTYPE_STATES, "a dtype that is not plain little-endian numbers")


def _reconstruct(kind: Any, shape: Any, code: Any) -> np.ndarray:
    """numpy's empty array to be filled by `set_array`."""
    require(kind is _NDARRAY and shape == (0,) and code in (b"b", "b"), "an array of a kind that is not known")
    return np.empty(0, np.int8)


def set_array(array: np.ndarray, state: Any) -> int:
    """Fills an array that `_reconstruct` made; returns its bytes."""
    version, shape, dtype, fortran_order, data = state
    require(array.shape == (0,) and version == 1 and type(fortran_order) is bool, "an array that is no plain array")
    require_array(shape, dtype, data)
    array.__setstate__((1, shape, dtype, fortran_order, data))
    return len(data)


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any, axis_order: Any = None) -> np.ndarray:
    """An array in protocol 5, as a view of its bytes."""
    require_array(shape, dtype, data)
    array = np.frombuffer(data, dtype)
    if order == "K":  # from numpy 2.3 on: neither C nor Fortran order
        return array.reshape(shape).transpose(axis_order)
    return array.reshape(shape, order=order)


def require_array(shape: Any, dtype: Any, data: Any) -> None:
    require(isinstance(dtype, np.dtype) and isinstance(data, (bytes, bytearray)), "an array without numbers")
    require(
        are_sizes(shape) and math.prod(shape) * dtype.itemsize == len(data), "an array of another size than its data"
    )


def _scalar(dtype: Any, data: Any) -> Any:
    require_array((), dtype, data)
    return np.frombuffer(data, dtype)[0]


_ARRAY_FUNCTIONS = {
    ("multiarray", "_reconstruct"): _reconstruct,
    ("multiarray", "scalar"): _scalar,
    ("numeric", "_frombuffer"): _from_buffer,
}

ARRAY_GLOBALS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _dtype,
    **{
        (f"{package}.{module}", name): function
        for package in ("numpy.core", "numpy._core")  # before and from numpy 2 on
        for (module, name), function in _ARRAY_FUNCTIONS.items()
    },
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
}
