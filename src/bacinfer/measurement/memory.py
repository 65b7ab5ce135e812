"""How much memory one call of a policy needs at its peak."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from bacinfer.core.calls import policy_device, seeded_noise, timed_call

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"  # what the kernel takes for it, see proc(5)


def peak_memory(policy: Any, obs: Any) -> int | None:
    """Bytes in use at the peak of one `predict_action`: tensors' on CUDA, on a CPU those of the whole process.

    None on a CPU whose system does not tell (all but Linux).
    """
    device = policy_device(policy)
    try:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return None
    with seeded_noise(policy, 0):
        timed_call(policy, obs)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    match = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
    return int(match[1]) * 1024 if match else None
