"""Unpickling that builds plain data, arrays and tensors, and nothing else, in memory that the file's size bounds.

A pickle is a program: it may import any function and call it. The unpickler here knows only the instructions of which
pickles of data consist, and only the names that it is given. What a pickle may call are functions of this project that
check what they are given: none of them reads memory that is not its own, or takes much more of it than the file.

PyTorch's own ``weights_only`` is not enough for that: with versions before 2.6 a file can run code (CVE-2025-32434),
before 2.10 it can read and write beyond its tensors (CVE-2026-24747).
"""

from __future__ import annotations

import io
import math
import pickle
import types
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import torch

Allowed = Mapping[tuple[str, str], Any]
"""What the names in a pickle stand for: functions may be called, classes of `Record` made, other things mentioned."""

# What reading may take in memory. Genuine files take their own size, and a little for each object.
_GROWTH = 4  # times the file's size
_LEAST_LIMIT = 2**25
_OBJECT = 32  # bytes: an instruction, or an object that is found again
_CALL = 1024  # bytes: what a call makes, besides the data that it is given
_DEPTH = 64  # containers in containers


class UnsafePickleError(ValueError):
    """A pickle asks for something that was not admitted."""


class DamagedPickleError(ValueError):
    """A pickle ends early or contradicts itself."""


class Record:
    """In the place of an object whose class is not built: what the pickle says of its state, whatever that is."""

    state: Any = None


class Mentioned:
    """In the place of a class that a pickle may mention; it stands for nothing."""


MENTIONED = Mentioned()


class Budget:
    """Memory that is left for what a file asks for, in bytes."""

    def __init__(self, limit: int) -> None:
        self.left = limit

    def spend(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise UnsafePickleError("it unfolds into far more than its size")


def memory_limit(size: int) -> int:
    """The bytes of memory that a file of `size` bytes may take."""
    return max(_LEAST_LIMIT, _GROWTH * size)


def load(data: bytes, allowed: Allowed) -> Any:
    """The plain data in a pickle: lists, tuples, dicts, numbers, text, bytes, and what `allowed` makes of such.

    Raises:
        UnsafePickleError: names the first thing that is not admitted.
        DamagedPickleError: it is no complete pickle.
    """
    limit = memory_limit(len(data))
    result = RestrictedUnpickler(io.BytesIO(data), allowed, limit).load()
    require_plain(result, limit)
    return result


def require_plain(data: Any, limit: int) -> None:
    """Makes sure that what was unpickled is data alone, and a tree: going through it ends, in memory and in time.

    A pickle can refer to an object again and again, also from within. A few hundred bytes make a list of lists of lists
    that has 2¹⁰⁰ entries for whoever prints or stacks it.

    Raises:
        UnsafePickleError: it holds something else, is nested too deeply, or is larger than `limit` when written out.
    """
    _walk(data, 0, Budget(limit))


def _walk(node: Any, depth: int, budget: Budget) -> None:
    budget.spend(_OBJECT)
    kind = type(node)
    if kind in (list, tuple, dict, torch.Size):
        if depth == _DEPTH:
            raise UnsafePickleError(f"it is nested more than {_DEPTH} levels deep")
        for child in chain(node, node.values()) if kind is dict else node:
            _walk(child, depth + 1, budget)
    elif kind in (str, bytes):
        budget.spend(len(node))
    elif isinstance(node, (np.ndarray, torch.Tensor)):
        budget.spend(node.nbytes)
    elif kind not in _PLAIN and not isinstance(node, np.generic):
        raise UnsafePickleError(f"it holds a {kind.__name__} where data is expected")


_PLAIN = (int, float, bool, type(None), torch.dtype)


def shorten(text: object) -> str:
    """What a file says, for an error message: a file may say anything, at any length."""
    text = str(text)
    return text if len(text) <= 200 and text.isprintable() else f"{text[:200]!r}…"


# -- the machine -----------------------------------------------------------------------------------------------------


class _Instructions:
    """The functions behind the opcodes; looking one up pays for the object that it makes."""

    def __init__(self, functions: Mapping[int, Any], budget: Budget) -> None:
        self._functions = functions
        self._budget = budget

    def __getitem__(self, opcode: int) -> Any:
        self._budget.spend(_OBJECT)
        return self._functions[opcode]


def _refuse_instruction(unpickler: Any) -> None:
    raise UnsafePickleError("it has an instruction that pickles of data do not have")


# What pickles of data in protocols 2 to 5 consist of, and does nothing but move it: no INST, OBJ, NEWOBJ_EX, EXT, …
_HARMLESS = (
    *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "NONE", "NEWTRUE", "NEWFALSE", "BINFLOAT"),
    *("BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_TUPLE"),
    *("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT", "MEMOIZE"),
    *("GLOBAL", "STACK_GLOBAL", "BINPERSID"),  # these ask `find_class` and `persistent_load`
)


class RestrictedUnpickler(pickle._Unpickler):
    """Resolves names through `allowed`, calls the functions in it, and takes no more than `limit` bytes of memory.

    It is the standard library's Python implementation, because the C one asks nobody before it calls and changes what a
    pickle has named. `load` returns what the pickle makes, unchecked: see `require_plain`.
    """

    dispatch: ClassVar[Any] = dict.fromkeys(range(256), _refuse_instruction) | {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _HARMLESS
    }
    stack: list[Any]
    read: Any
    append: Any
    pop_mark: Any

    def __init__(self, file: io.BytesIO, allowed: Allowed, limit: int) -> None:
        super().__init__(file)
        self._allowed = allowed
        self._budget = Budget(limit)
        self.dispatch = _Instructions(self.dispatch, self._budget)  # type: ignore[misc]

    def load(self) -> Any:
        """Raises UnsafePickleError or DamagedPickleError."""
        try:
            return super().load()
        except (UnsafePickleError, DamagedPickleError):
            raise
        except Exception as error:  # a damaged pickle can raise nearly anything
            raise DamagedPickleError(
                f"it is damaged or no pickle ({type(error).__name__}: {shorten(error)})"
            ) from error

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise UnsafePickleError(
                f"it asks for {shorten(f'{module}.{name}')}, which is not among the data types that are read"
            ) from None

    def load_bytearray8(self) -> None:
        size = int.from_bytes(self.read(8), "little")
        self.append(bytearray(self.read(size)))  # not made before there is something to fill it

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack[-1]
        if type(function) is not types.FunctionType or type(arguments) is not tuple:  # functions are `allowed` ones
            raise UnsafePickleError(f"it asks to call a {type(function).__name__}")
        self._budget.spend(_CALL + sum(len(a) for a in arguments if isinstance(a, (str, bytes, bytearray))))
        self.stack[-1] = function(*arguments)

    def load_newobj(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if not (isinstance(kind, type) and issubclass(kind, Record)) or arguments != ():
            raise UnsafePickleError(f"it asks to make an object of a {type(kind).__name__}")
        self.stack.append(kind())

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Record):
            target.state = state
        elif isinstance(target, np.dtype):
            _check_dtype_state(state)
        elif isinstance(target, np.ndarray):
            self._budget.spend(_set_array(target, state))
        elif type(target) is not dict:  # a dict's are the attributes of an OrderedDict, and no data
            raise UnsafePickleError(f"it tries to change a {type(target).__name__}")

    def load_append(self) -> None:
        value = self.stack.pop()
        self._container(list).append(value)

    def load_appends(self) -> None:
        values = self.pop_mark()
        self._container(list).extend(values)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = self._container(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not _is_key(key):
                raise UnsafePickleError(f"it has a dict with a {type(key).__name__} for a key")
            target[key] = value

    def _container(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise UnsafePickleError(f"it adds to a {type(self.stack[-1]).__name__}, expected a {kind.__name__}")
        return self.stack[-1]

    dispatch |= {
        pickle.BYTEARRAY8[0]: load_bytearray8,
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.BUILD[0]: load_build,
        pickle.APPEND[0]: load_append,
        pickle.APPENDS[0]: load_appends,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }


def _is_key(key: Any) -> bool:
    """Whether this is a key that pickles of data have, and that no file can make slow to find.

    The hash of nested tuples can take years, and large numbers can be chosen to have equal hashes. OmegaConf's caches
    have short tuples of text.
    """
    if type(key) is tuple:
        return len(key) < 10 and all(type(part) is str for part in key)
    return type(key) in (str, bytes, bool, type(None)) or (type(key) is int and key.bit_length() < 61)


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise UnsafePickleError(f"it has {what}")


def _is_size(size: Any) -> bool:
    return type(size) is int and size >= 0


def _are_sizes(sizes: Any) -> bool:
    """Whether this is a shape, or strides."""
    return isinstance(sizes, tuple) and all(map(_is_size, sizes))


# -- bytes, arrays ---------------------------------------------------------------------------------------------------


def _encode(text: str, encoding: str) -> bytes:
    """Bytes in protocol 2; other codecs have no place there."""
    _require(encoding in ("latin1", "latin-1"), f"text in the codec {shorten(encoding)}")
    return text.encode("latin-1")


def _no_bytes() -> bytes:
    """Empty bytes in protocol 2; with an argument this would make any number of them."""
    return b""


_NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
_DTYPE_STATES = [(3, order, None, None, None, -1, -1, 0) for order in ("<", "|")]
_NDARRAY = Mentioned()


def _dtype(code: str, align: bool = False, copy: bool = False) -> np.dtype:
    _require(code in _NUMBERS, f"an array of dtype {shorten(code)}, expected numbers")
    return np.dtype(code)


def _check_dtype_state(state: Any) -> None:
    # numpy would take fields and flags from it, and so believe that numbers are pointers
    _require(state in _DTYPE_STATES, "a dtype that is not plain little-endian numbers")


def _reconstruct(kind: Any, shape: Any, code: Any) -> np.ndarray:
    """numpy's empty array to be filled by `_set_array`."""
    _require(kind is _NDARRAY and shape == (0,) and code in (b"b", "b"), "an array of a kind that is not known")
    return np.empty(0, np.int8)


def _set_array(array: np.ndarray, state: Any) -> int:
    """Fills an array that `_reconstruct` made; returns its bytes."""
    version, shape, dtype, fortran_order, data = state
    _require(array.shape == (0,) and version == 1 and type(fortran_order) is bool, "an array that is no plain array")
    _require_array(shape, dtype, data)
    array.__setstate__((1, shape, dtype, fortran_order, data))
    return len(data)


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any, axis_order: Any = None) -> np.ndarray:
    """An array in protocol 5, as a view of its bytes."""
    _require_array(shape, dtype, data)
    array = np.frombuffer(data, dtype)
    if order == "K":  # from numpy 2.3 on: neither C nor Fortran order
        return array.reshape(shape).transpose(axis_order)
    return array.reshape(shape, order=order)


def _require_array(shape: Any, dtype: Any, data: Any) -> None:
    _require(isinstance(dtype, np.dtype) and isinstance(data, (bytes, bytearray)), "an array without numbers")
    _require(
        _are_sizes(shape) and math.prod(shape) * dtype.itemsize == len(data), "an array of another size than its data"
    )


def _scalar(dtype: Any, data: Any) -> Any:
    _require_array((), dtype, data)
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


# -- tensors ---------------------------------------------------------------------------------------------------------


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
        _require(type(found) is tuple and len(found) in (5, 6) and found[0] == "storage", "a reference to no storage")
        _, dtype, key, _, length, *view = found
        known = isinstance(dtype, torch.dtype) and type(key) is str and view in ([], [None])
        _require(known and _is_size(length), "a storage of a kind that is not known")
        return cls(key, dtype, length * dtype.itemsize)


def _tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> torch.Tensor:
    """A view of a storage that shows each of its elements at most once."""
    _require(isinstance(storage, Storage) and not hooks and not metadata, "a tensor that is not plain")
    _require(_are_sizes(shape) and _are_sizes(strides) and _is_size(offset) and len(shape) == len(strides), "no tensor")
    held = storage.memory.nbytes() // storage.dtype.itemsize
    end = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1
    fits = math.prod(shape) <= held and (end <= held or 0 in shape) and offset <= held
    _require(fits, f"a tensor of {shorten(tuple(shape))} from element {offset} on in a storage of {held}")
    tensor = torch.empty(0, dtype=storage.dtype).set_(storage.memory, offset, tuple(shape), tuple(strides))
    return tensor.requires_grad_(requires_grad is True)


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> torch.nn.Parameter:
    _require(isinstance(data, torch.Tensor) and not hooks, "a parameter that is no tensor")
    return torch.nn.Parameter(data, requires_grad is True)


def _shape(sizes: Any) -> torch.Size:
    _require(_are_sizes(sizes), "a shape that is none")
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
    _require(type(data) is bytes, "a storage without data")
    file = io.BytesIO(data)
    limit = memory_limit(len(data))
    magic, _, machine, found, keys = (_StorageUnpickler(file, _STORAGE_CLASSES, limit).load() for _ in range(5))
    _require(magic == 0x1950A86A20F9469CFC6C and machine["little_endian"] is True, "a storage of another format")
    _require(isinstance(found, StorageId) and keys == [found.key], "another number of storages than one")
    file.read(8)
    elements = bytearray(file.read())
    _require(len(elements) == found.size, "a storage of another size than its data")
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
