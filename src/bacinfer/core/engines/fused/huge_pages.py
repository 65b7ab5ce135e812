"""Memory in huge pages, where the system has them: what streams through many megabytes waits less for addresses."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor


def empty(size: int) -> Tensor:
    """Memory for `size` numbers in single precision, huge pages if they are to be had (Linux)."""
    if not hasattr(mmap, "MADV_HUGEPAGE") or size == 0:
        return torch.empty(size)
    memory = mmap.mmap(-1, 4 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system that was built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32)
