"""Where policies run."""

from __future__ import annotations

import torch


def check_device(name: str) -> torch.device:
    """Raises ValueError if PyTorch has no such device here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here ({reason}); try --device cpu") from error
    return device
