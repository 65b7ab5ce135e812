"""How much one call of a policy computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bacinfer.core.calls import sample, seeded_noise
from bacinfer.core.engines.observing import observe_residuals


def count_flops(policy: Any, obs: Any) -> int:
    """Floating-point operations of one sampled action chunk: those of its matrix products, 2 per multiply-add.

    Masked attention counts in full, elementwise operations not at all. Cached blocks are counted layer by layer,
    whatever engine runs them: a fused one computes somewhat less.

    Raises:
        RuntimeError: PyTorch is older than 2.3, where the fused path of attention cannot be switched off.
    """
    if not hasattr(torch.backends, "mha"):
        raise RuntimeError(f"counting FLOPs needs PyTorch 2.3 or later, this is {torch.__version__}")
    with (
        seeded_noise(policy, 0),
        _countable_attention(),
        observe_residuals(policy, lambda *_: None),  # what is observed runs layer by layer
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
    ):
        sample(policy, obs)
    return counter.get_total_flops()


@contextmanager
def _countable_attention() -> Iterator[None]:
    """Attention from plain matrix products, inside.

    The counter sees neither into the fused inference path of `nn.MultiheadAttention` and
    `nn.TransformerEncoderLayer` nor into the fused attention kernel of the CPU.
    """
    cuda = torch.backends.cuda  # (its switches hold for the CPU as well)
    switches = [
        (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
        (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
        (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    ]
    if hasattr(cuda, "cudnn_sdp_enabled"):
        switches.append((cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp))
    with ExitStack() as stack:
        for is_enabled, enable in switches:
            stack.callback(enable, is_enabled())
            enable(False)
        stack.callback(cuda.enable_math_sdp, cuda.math_sdp_enabled())
        cuda.enable_math_sdp(True)
        yield
