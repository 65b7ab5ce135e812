"""Unpickling that builds plain data, arrays and tensors, and nothing else, in memory that the file's size bounds.

A pickle is a program: it may import any function and call it. The unpickler here knows only the instructions of which
pickles of data consist, and only the names that it is given. What a pickle may call are functions of this project that
check what they are given: none of them reads memory that is not its own, or takes much more of it than the file.

PyTorch's own ``weights_only`` is not enough for that: with versions before 2.6 a file can run code (CVE-2025-32434),
before 2.10 it can read and write beyond its tensors (CVE-2026-24747).
"""

from __future__ import annotations

from bacinfer.safe_pickle.arrays import ARRAY_GLOBALS
from bacinfer.safe_pickle.limits import Budget, DamagedPickleError, UnsafePickleError, memory_limit, shorten
from bacinfer.safe_pickle.machine import Allowed, RestrictedUnpickler, load, require_plain
from bacinfer.safe_pickle.records import MENTIONED, Mentioned, Record
from bacinfer.safe_pickle.tensors import TENSOR_GLOBALS, Storage, StorageId

__all__ = [
    "ARRAY_GLOBALS",
    "MENTIONED",
    "TENSOR_GLOBALS",
    "Allowed",
    "Budget",
    "DamagedPickleError",
    "Mentioned",
    "Record",
    "RestrictedUnpickler",
    "Storage",
    "StorageId",
    "UnsafePickleError",
    "load",
    "memory_limit",
    "require_plain",
    "shorten",
]
