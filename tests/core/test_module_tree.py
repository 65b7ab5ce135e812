from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from bacinfer.core.module_tree import ModuleTree


def make_model() -> Any:
    return nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.ReLU(), nn.Sequential()), nn.Dropout())


CHANGES: dict[str, Callable[[Any], object]] = {
    "a module more": lambda model: model[1][1].append(nn.Dropout()),
    "a module less": lambda model: model[1].__delitem__(0),
    "another module": lambda model: model.__setitem__(0, nn.Linear(1, 1)),
    "another subtree": lambda model: model.__setitem__(1, nn.Sequential(nn.ReLU(), nn.Sequential(nn.Dropout()))),
    "no module": lambda model: model.register_module("0", None),
    "other children": lambda model: setattr(model[1], "_modules", {"0": nn.Dropout()}),
    "a module elsewhere": lambda model: model[1][1].append(model[0]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(change: Callable[[Any], object]) -> None:
    model = make_model()
    tree = ModuleTree(model)
    assert tree.now() == list(model.modules())
    change(model)
    assert set(tree.now()) == set(model.modules())


def test_modules_are_those_of_the_copy() -> None:
    model = make_model()
    tree = ModuleTree(model)
    tree.now()
    for others in (copy.deepcopy((model, tree)), pickle.loads(pickle.dumps((model, tree)))):
        other_model, other_tree = others
        assert other_tree.now() == list(other_model.modules())
        other_model.append(nn.ReLU())
        assert other_tree.now() == list(other_model.modules())


def test_it_walks_again_only_after_a_change() -> None:
    model = make_model()
    tree = ModuleTree(model)
    first = tree.now()
    assert tree.now() is first
