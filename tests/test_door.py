"""`import bacinfer`: all that a user needs, and nothing else."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import bacinfer
from bacinfer import policies


def test_all_that_is_offered_is_there_and_explained() -> None:
    offered = [getattr(bacinfer, name) for name in bacinfer.__all__]
    assert sorted(bacinfer.__all__) == bacinfer.__all__
    assert bacinfer.__version__ == version("bacinfer")
    for thing in offered:
        if inspect.isfunction(thing):
            parts = ("Args:", "Raises:")
            assert all(part in (inspect.getdoc(thing) or "") for part in parts), thing.__name__
        elif inspect.isclass(thing):
            assert thing.__doc__, thing.__name__


def test_importing_it_imports_neither_hydra_nor_diffusers() -> None:
    heavy = "{'hydra', 'omegaconf', 'diffusers', 'matplotlib', 'scipy', 'gymnasium'}"
    code = f"import sys, bacinfer; assert callable(bacinfer.measure); print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_load_policy_is_that_of_policies(checkpoint: Path) -> None:
    ours, theirs = (inspect.signature(f).parameters.values() for f in (bacinfer.load_policy, policies.load_policy))
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]
    assert bacinfer.summary(bacinfer.load_policy(checkpoint)).mode == "original"
