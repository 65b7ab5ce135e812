"""CUDA graphs on a machine without CUDA: what ran during a capture runs again, on the very same memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bacinfer.core.engines import choose
from bacinfer.core.engines.fused import cuda_graph, engine, kernel_program


class StandInGraph(TorchDispatchMode):
    """Records the operations of its capture; a replay repeats them and writes their results to where they were."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Any] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for func, args, kwargs, result in self.operations:
                for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class StandInStream:
    def wait_stream(self, other: Any) -> None: ...


def stand_in_for_cuda(monkeypatch: pytest.MonkeyPatch) -> list[StandInGraph]:
    """Puts them in the place of PyTorch's; the graphs that are captured. Programs are in none of the GPU's kernels."""
    captured: list[StandInGraph] = []

    @contextmanager
    def capture(graph: StandInGraph) -> Iterator[None]:
        captured.append(graph)
        with torch.random.fork_rng(), graph:  # what is captured does not run
            yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandInGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", StandInStream)
    monkeypatch.setattr(torch.cuda, "current_stream", StandInStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(engine, "check_device", lambda *_: None)
    monkeypatch.setattr(cuda_graph, "obstacle_to_kernels", lambda _: "a stand-in records calls of PyTorch alone")
    return captured


def policies_are_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the choice of an engine, beside `stand_in_for_cuda`; which kernels there are is found as on a GPU."""
    for module in (choose, engine):
        monkeypatch.setattr(module, "fastest_on", lambda _: "cuda_graph")
    monkeypatch.setattr(cuda_graph, "obstacle_to_kernels", kernel_program.obstacle_to_kernels)
    monkeypatch.setattr(kernel_program, "find_spec", lambda name: name)  # Triton is there
