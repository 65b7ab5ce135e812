#!/usr/bin/env bash
# Checks that lerobot reads the data sets of `bacinfer collect-data`, and writes the same. Arguments go to pytest.
# The environment takes 8 GB. With FFmpeg's libraries installed, frames are decoded by torchcodec as well as by PyAV.
export BACINFER_VENV="${BACINFER_LEROBOT_VENV:-.venv-lerobot}"
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
if [ ! -x "$VENV/bin/python" ]; then "${PYTHON_LEROBOT:-python3}" -m venv "$VENV"; fi
PYTHON="$VENV/bin/python"
# lerobot chooses PyTorch's release, so that constraints.txt does not hold here
"$PYTHON" -m pip install --quiet --disable-pip-version-check lerobot==0.4.4 -e ".[sim,train,lerobot]" pytest hypothesis

[ $# -gt 0 ] || set -- -rs tests/datasets
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 exec "$PYTHON" -m pytest "$@"
