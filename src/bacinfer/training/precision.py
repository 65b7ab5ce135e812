"""The precisions that a policy may be trained in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

PRECISIONS = ("fp32", "tf32", "bf16")


@contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    with ExitStack() as stack:
        if precision == "bf16":
            stack.enter_context(torch.autocast(device.type, torch.bfloat16))
            if device.type == "cpu":
                stack.enter_context(_no_flash_attention())
        yield


@contextmanager
def _no_flash_attention() -> Iterator[None]:
    """On a CPU its backward in bfloat16 takes longer than everything else together."""
    before = torch.backends.cuda.flash_sdp_enabled()  # CUDA's by name only
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_flash_sdp(before)


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
