"""What a policy runs on: the hardware, the versions, and the limits of the machine itself, as they are measured."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bacinfer.core.calls import timed

_PRODUCT_SIDE = 2048
_COPIED_NUMBERS = 1 << 25  # 128 MB: more than caches hold
_REPEATS = 7
_CPUINFO = Path("/proc/cpuinfo")
_INSTRUCTIONS = ("avx512_bf16", "avx512f", "avx2", "avx", "asimd")  # what compiled code makes use of, the best first


@dataclass(frozen=True)
class Machine:
    """A machine, as a policy's calls meet it.

    Attributes:
        hardware: The processor's or the accelerator's name.
        threads: Those that PyTorch uses.
        instructions: The best vector instructions that compiled code makes use of; empty where they are not known.
        clock_mhz: What the system says now; a virtual machine's says what it was sold as.
        product_rate: Of the largest products that PyTorch is quick at, 2048 x 2048 x 2048, in single precision: FLOP/s.
        product_rate_bf16: The same in bfloat16.
        bandwidth: Of a copy of 128 MB, read and written, in bytes a second.
    """

    hardware: str
    device: str
    threads: int
    instructions: str
    clock_mhz: float | None
    python: str
    torch: str
    bacinfer: str
    product_rate: float
    product_rate_bf16: float
    bandwidth: float


def measure_machine(device: str | torch.device = "cpu") -> Machine:
    """Reads what the system says, and measures the limits, which takes about a second."""
    device = torch.device(device)
    side = torch.randn(_PRODUCT_SIDE, _PRODUCT_SIDE, device=device)
    source = torch.zeros(_COPIED_NUMBERS, device=device)
    target = torch.zeros_like(source)
    half = side.to(torch.bfloat16)
    flops = 2 * _PRODUCT_SIDE**3
    return Machine(
        hardware=hardware_name(device),
        device=str(device),
        threads=torch.get_num_threads(),
        instructions=_instructions() if device.type == "cpu" else "",
        clock_mhz=_clock() if device.type == "cpu" else None,
        python=platform.python_version(),
        torch=torch.__version__,
        bacinfer=version("bacinfer"),
        product_rate=flops / _shortest(lambda: side @ side, device),
        product_rate_bf16=flops / _shortest(lambda: half @ half, device),
        bandwidth=2 * source.nbytes / _shortest(lambda: target.copy_(source), device),
    )


def hardware_name(device: torch.device) -> str:
    """The processor's name, or that of the accelerator that a device is."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = _cpuinfo("model name")
    return found[0] if found else platform.processor() or platform.machine()


def _shortest(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the shortest of several calls: what the machine can, whatever else runs on it."""
    return min(timed(call, device)[1] for _ in range(_REPEATS))


def _instructions() -> str:
    flags = set(" ".join(_cpuinfo("flags") or _cpuinfo("Features")).split())
    return next((name for name in _INSTRUCTIONS if name in flags), "")


def _clock() -> float | None:
    found = _cpuinfo("cpu MHz")
    return max(map(float, found)) if found else None


def _cpuinfo(entry: str) -> list[str]:
    """What Linux says of each processor; nothing elsewhere."""
    text = _CPUINFO.read_text() if _CPUINFO.is_file() else ""
    return re.findall(rf"^{entry}\s*:\s*(.+)$", text, re.MULTILINE)
