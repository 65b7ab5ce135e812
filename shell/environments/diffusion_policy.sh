#!/usr/bin/env bash
# Checks this project against the diffusion_policy package itself: policies, checkpoints, the cache and the engines on
# them, data sets, and its runners of Push-T and block pushing.
#
#     bash shell/environments/diffusion_policy.sh CHECKOUT [ARGUMENT OF PYTEST ...]
#
# CHECKOUT is a clone of real-stanford/diffusion_policy. The environment needs Python 3.10 or 3.11, a C compiler and CMake.
set -euo pipefail
if [ $# = 0 ] || [ ! -d "$1/diffusion_policy/env_runner" ]; then
    echo "error: expected a checkout of the diffusion_policy package, found '${1:-}'" >&2
    exit 2
fi
CHECKOUT="$(CDPATH='' cd -- "$1" && pwd)"
shift
export BACINFER_VENV="${BACINFER_DIFFUSION_POLICY_VENV:-.venv-diffusion-policy}"
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
install sim,train,zarr

REQUIREMENTS=shell/environments/diffusion_policy.txt
# gym 0.21 can be built by these alone
"$PYTHON" -m pip install --quiet --disable-pip-version-check "pip<24.1" "setuptools==65.7.0" "wheel<0.39"
"$PYTHON" -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt \
    -r "$REQUIREMENTS" pytest hypothesis
"$PYTHON" -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps robomimic==0.2.0 egl-probe

[ $# -gt 0 ] || set -- -rs tests/policies tests/tasks/test_pusht_against_diffusion_policy.py \
    tests/training/test_block_pushing_on_diffusion_policy.py
export PYTHONPATH="$CHECKOUT${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1 SDL_VIDEODRIVER=dummy MUJOCO_GL=egl
exec "$PYTHON" -m pytest "$@"
