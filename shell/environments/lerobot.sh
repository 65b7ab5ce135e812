#!/usr/bin/env bash
# Checks this project against lerobot itself: plans on its policies, its own commands, data sets, and the page of the docs.
# Arguments go to pytest.
# The environment takes 6 GB and Python 3.12 or later, $PYTHON_LEROBOT if that is not `python3`. With FFmpeg's libraries
# installed, frames are decoded by torchcodec as well as by PyAV.
export BACINFER_VENV="${BACINFER_LEROBOT_VENV:-.venv-lerobot}"
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
if [ ! -x "$VENV/bin/python" ]; then
    "${PYTHON_LEROBOT:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 12))' ||
        { echo "error: lerobot needs Python 3.12 or later; name one by PYTHON_LEROBOT" >&2; exit 2; }
    "${PYTHON_LEROBOT:-python3}" -m venv "$VENV"
fi
PYTHON="$VENV/bin/python"
# lerobot chooses PyTorch's release, so that constraints.txt does not hold here; of what GR00T needs, dm-tree is enough
"$PYTHON" -m pip install --quiet --disable-pip-version-check \
    "lerobot[multi-task-dit,smolvla,pi,xvla,evo1,vla-jepa,fastwam,dataset,evaluation,pusht]==0.6.1" "dm-tree<1" \
    -e ".[sim,train,lerobot]" -e ./src/lerobot_policy_bacinfer pytest hypothesis

[ $# -gt 0 ] || set -- -rs tests/lerobot_policies tests/datasets
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 exec "$PYTHON" -m pytest "$@"
