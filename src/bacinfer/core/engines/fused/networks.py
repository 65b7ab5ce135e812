"""The networks that programs are made of, recognised by their structure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bacinfer.core.blocks import Block
from bacinfer.core.engines.fused.denoiser import Denoiser, check_untouched, read_denoiser
from bacinfer.core.engines.fused.dit import DiT, is_dit, read_dit

Network = Denoiser | DiT


def read_network(model: Any, blocks: Sequence[Block]) -> Network:
    """Recognises a denoising model.

    Raises:
        UnsupportedPolicyError: it is none of them, or something hooks into it.
    """
    network = read_dit(model, blocks) if is_dit(model) else read_denoiser(model, blocks)
    check_untouched(model)
    return network
