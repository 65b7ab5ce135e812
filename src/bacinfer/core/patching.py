"""Shadowing a method of one object by an instance attribute, with an exact undo.

A `Patch` is a callable object rather than a closure: deep copies and pickles of the patched object carry a patch
of their own, bound to the copy.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch


class Patch:
    """Replaces ``owner.name`` while it is installed. Subclasses say by `run` with what."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner = owner
        self.name = name
        self.shadowed: Any = None  # an instance attribute that was there before, such as another library's patch

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the method that is replaced."""
        if self.shadowed is not None:
            return self.shadowed(*args, **kwargs)
        return getattr(type(self.owner), self.name)(self.owner, *args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # torch.compile of something that calls this leaves it out of its graphs: they would hold one step's decisions.
        if torch.compiler.is_compiling():
            return torch.compiler.disable(self.run)(*args, **kwargs)
        return self.run(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.shadowed or getattr(type(self.owner), self.name).__get__(self.owner))

    @property
    def installed(self) -> bool:
        return vars(self.owner).get(self.name) is self

    def install(self) -> None:
        self.shadowed = vars(self.owner).get(self.name)
        setattr(self.owner, self.name, self)

    def remove(self) -> None:
        if self.shadowed is not None:
            setattr(self.owner, self.name, self.shadowed)
        else:
            delattr(self.owner, self.name)


def remove_patches(patches: Sequence[Patch]) -> None:
    """Removes all patches, or none.

    Raises:
        RuntimeError: if somebody replaced one of the patched methods since; removing would undo their change.
    """
    covered = [patch for patch in patches if not patch.installed]
    if covered:
        names = ", ".join(f"{type(p.owner).__name__}.{p.name}" for p in covered)
        raise RuntimeError(f"{names} was replaced after the cache was applied; undo that first, then remove the cache")
    for patch in reversed(patches):
        patch.remove()


def replaced_methods(owner: Any) -> list[str]:
    """Names of the methods of `owner` that somebody else replaced by an instance attribute."""
    return [
        name
        for name, value in vars(owner).items()
        if callable(value) and hasattr(type(owner), name) and not _is_own_method(owner, name, value)
    ]


def _is_own_method(owner: Any, name: str, value: Any) -> bool:
    """Whether it is the class's method itself, bound to `owner`, be it beneath patches of ours."""
    while isinstance(value, Patch):
        value = value.shadowed
    method = getattr(type(owner), name)
    return value is None or (inspect.isfunction(method) and value == method.__get__(owner))
