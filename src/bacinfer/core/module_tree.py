"""A model's modules, walked through again only where children of one have changed."""

from __future__ import annotations

from itertools import chain
from operator import attrgetter, methodcaller

from torch import nn

_CHILDREN, _VALUES = attrgetter("_modules"), methodcaller("values")


class ModuleTree:
    """All modules of a model, itself included. Copies have still to walk through theirs.

    Args:
        model: Its root.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules: list[nn.Module] = []
        self._children: list[nn.Module | None] = []

    def __reduce__(self) -> tuple[type[ModuleTree], tuple[nn.Module]]:
        return ModuleTree, (self._model,)

    def now(self) -> list[nn.Module]:
        """Those that it has now."""
        if not self._modules or self._read_children() != self._children:
            self._modules = list(self._model.modules())
            self._children = self._read_children()
        return self._modules

    def _read_children(self) -> list[nn.Module | None]:
        return list(chain.from_iterable(map(_VALUES, map(_CHILDREN, self._modules))))
