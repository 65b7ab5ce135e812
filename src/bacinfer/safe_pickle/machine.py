"""The unpickler: the instructions of which pickles of data consist, and what they may do."""

from __future__ import annotations

import io
import pickle
import types
from collections.abc import Mapping
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import torch

from bacinfer.safe_pickle.arrays import check_dtype_state, set_array
from bacinfer.safe_pickle.limits import (
    CALL,
    OBJECT,
    Budget,
    DamagedPickleError,
    UnsafePickleError,
    memory_limit,
    shorten,
)
from bacinfer.safe_pickle.records import Record

Allowed = Mapping[tuple[str, str], Any]
"""What the names in a pickle stand for: functions may be called, classes of `Record` made, other things mentioned."""

_DEPTH = 64  # containers in containers


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
    budget.spend(OBJECT)
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


class _Instructions:
    """The functions behind the opcodes; looking one up pays for the object that it makes."""

    def __init__(self, functions: Mapping[int, Any], budget: Budget) -> None:
        self._functions = functions
        self._budget = budget

    def __getitem__(self, opcode: int) -> Any:
        self._budget.spend(OBJECT)
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
        self._budget.spend(CALL + sum(len(a) for a in arguments if isinstance(a, (str, bytes, bytearray))))
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
            check_dtype_state(state)
        elif isinstance(target, np.ndarray):
            self._budget.spend(set_array(target, state))
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
