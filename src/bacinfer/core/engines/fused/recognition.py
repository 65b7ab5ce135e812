"""Which functions a program stands for: those that it was written for, known by identity or by their text.

A policy that is built like Diffusion Policy's may still compute something else, in a subclass's sampling loop for
instance, and comparing a few numbers does not always show it. So `engine="auto"` makes programs of known functions
only.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar

from bacinfer.core.engines.loops import Loop
from bacinfer.core.patching import replaced_methods

_Function = TypeVar("_Function", bound=Callable[..., Any])

_known: set[Any] = set()
_KNOWN_TEXTS = {  # of the package diffusion_policy, by `text_digest`
    "c14c9cac94ebb242b6616093339ac11a",  # conditional_sample of its transformer policies, low-dimensional and image
    "770bfb7a280fbbc0c1b0e92d3a680dd7",  # TransformerForDiffusion.forward
    "99ee62b09028b09b3aa197009216b5ee",  # SinusoidalPosEmb.forward
}
_CALLS = ("__call__", "_wrapped_call_impl", "_call_impl", "__getattr__")  # what leads from a module to its forward
_PARTS = ("forward", "_sa_block", "_mha_block", "_ff_block", "_rotate_half")


def program_stands_for(function: _Function) -> _Function:
    """Marks a sampling loop or a forward that programs were written for and are tested against."""
    _known.add(function)
    return function


def unknown_function(loop: Loop) -> str | None:
    """The first function that a program would replace and was not written for, as ``Class.name``; None: none."""
    for owner, name in dict.fromkeys(_replaced_functions(loop)):
        function = getattr(owner, name)
        if not (function in _known or _is_librarys_own(owner, name) or text_digest(function) in _KNOWN_TEXTS):
            return f"{owner.__qualname__}.{name}"
    return None


def knows_loop(policy: Any) -> bool:
    """Whether a policy's `conditional_sample` is the loop that programs were written for."""
    function = getattr(type(policy), "conditional_sample", None)
    known = function in _known or text_digest(function) in _KNOWN_TEXTS
    return known and "conditional_sample" not in replaced_methods(policy)


def _replaced_functions(loop: Loop) -> Iterator[tuple[type, str]]:
    yield from ((type(loop.owner), name) for name in loop.functions)
    scheduler = type(loop.scheduler)
    for base in scheduler.__mro__ if loop.scheduler is not None else ():
        yield from ((scheduler, name) for name, value in vars(base).items() if isinstance(value, FunctionType))
        if _library(base) is not None:
            break
    for module in loop.model.modules():
        yield from ((type(module), name) for name in (*_CALLS, *_PARTS) if hasattr(type(module), name))


def _is_librarys_own(owner: type, name: str) -> bool:
    """Whether a method comes from PyTorch or diffusers, and was not put there by somebody else."""
    definer = next(base for base in owner.__mro__ if name in vars(base))
    library, code = _library(definer), getattr(vars(definer)[name], "__code__", None)
    return library is not None and code is not None and Path(code.co_filename).is_relative_to(library)


def _library(owner: type) -> Path | None:
    """The directory of the library that a class is part of, if it is one whose functions are known."""
    package = owner.__module__.partition(".")[0]
    return Path(sys.modules[package].__path__[0]) if package in ("torch", "diffusers") else None


def text_digest(function: Any) -> str | None:
    """Of a function's own text, as it is without comments, docstring and layout; None where there is none."""
    try:
        # of the code: what a wrapper says of itself is what it wraps
        tree = ast.parse(textwrap.dedent(inspect.getsource(function.__code__)))
    except (AttributeError, OSError, TypeError, SyntaxError):
        return None
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef):  # a lambda's text is the statement around it
        return None
    if ast.get_docstring(definition) is not None:
        del definition.body[0]
    return hashlib.sha256(ast.unparse(definition).encode()).hexdigest()[:32]
