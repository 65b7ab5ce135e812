#!/usr/bin/env bash
# Checks the engines on an NVIDIA GPU: CUDA graphs, and caches on policies that are moved. Arguments go to pytest.
export BACINFER_VENV="${BACINFER_CUDA_VENV:-.venv-cuda}"
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
install test
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "error: PyTorch finds no CUDA device here, so that there is nothing to check" >&2; exit 2; }
"$PYTHON" -c 'import torch; print(f"PyTorch {torch.__version__} on {torch.cuda.get_device_name()}")' >&2

[ $# -gt 0 ] || set -- -rs tests/core
OMP_NUM_THREADS=1 exec "$PYTHON" -m pytest "$@"
