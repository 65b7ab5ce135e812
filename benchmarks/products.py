"""How fast PyTorch's products with weights are here, in single precision: MKL's, its default, and oneDNN's.

    python benchmarks/products.py

Billions of floating-point operations a second of both, and their ratio, by the number of rows. The engine ``onednn``
leaves products of few rows or few weights as they are (`bacinfer.core.engines.onednn`), as this shows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

SHAPES = ((256, 1024), (768, 2304), (960, 2560), (1024, 1024), (1024, 3072), (1024, 4096), (4096, 1024))
ROWS = (1, 8, 16, 32, 50, 64, 100, 164, 196, 400)
NUM_CALLS = 9


def seconds_in_turn(*products: Callable[[], Tensor]) -> list[float]:
    """Median seconds of each, called in turn."""
    found: list[list[float]] = [[] for _ in products]
    for _ in range(NUM_CALLS + 1):  # the first call counts little in a median
        for product, times in zip(products, found, strict=True):
            start = time.perf_counter()
            product()
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in found]


def main() -> None:
    torch.manual_seed(0)
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads; rows: MKL / oneDNN = ratio")
    for inputs, outputs in SHAPES:
        weight, bias = torch.randn(outputs, inputs), torch.randn(outputs)
        cells = []
        for rows in ROWS:
            x = torch.randn(rows, inputs)
            mkl, onednn = seconds_in_turn(
                lambda x=x, w=weight, b=bias: F.linear(x, w, b),
                lambda x=x, w=weight, b=bias: torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], ""),
            )
            rate = 2e-9 * rows * inputs * outputs
            cells.append(f"{rows}: {rate / mkl:.0f} / {rate / onednn:.0f} = {mkl / onednn:.2f}")
        print(f"{inputs} x {outputs}  {'  '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
