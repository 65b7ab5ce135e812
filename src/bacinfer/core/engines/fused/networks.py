"""The networks that programs are made of, recognised by their structure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from bacinfer.core.blocks import Block
from bacinfer.core.engines.base import UnsupportedPolicyError
from bacinfer.core.engines.fused.denoiser import Denoiser, read_denoiser
from bacinfer.core.engines.fused.dit import DiT, is_dit, read_dit
from bacinfer.core.patching import replaced_methods

Network = Denoiser | DiT


def read_network(model: Any, blocks: Sequence[Block]) -> Network:
    """Recognises a denoising model.

    Raises:
        UnsupportedPolicyError: it is none of them, or something hooks into it.
    """
    network = read_dit(model, blocks) if is_dit(model) else read_denoiser(model, blocks)
    _check_untouched(model)
    return network


def _check_untouched(model: nn.Module) -> None:
    """Raises UnsupportedPolicyError if something hooks into a model."""
    if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
        raise UnsupportedPolicyError("there are forward hooks on all modules, which a fused program would skip")
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise UnsupportedPolicyError(f"its {name or 'model'} has forward hooks, which a fused program would skip")
        replaced = replaced_methods(module)
        if replaced:
            raise UnsupportedPolicyError(f"somebody replaced {', '.join(replaced)} of its {name or 'model'}")
