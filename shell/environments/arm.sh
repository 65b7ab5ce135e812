#!/usr/bin/env bash
# Checks the engines and their compiled code on a 64-bit ARM processor (Linux, macOS). Arguments go to pytest.
# Needs a C++ compiler. For another processor there is shell/test_arm.sh.
export BACINFER_VENV="${BACINFER_ARM_VENV:-.venv-arm}"
case "$(uname -m)" in
    aarch64 | arm64) ;;
    *) echo "error: this is a $(uname -m) processor; run it on aarch64 (arm64)" >&2; exit 2 ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
if [ ! -x "$VENV/bin/python" ]; then python3 -m venv "$VENV"; fi
PYTHON="$VENV/bin/python"
# not [test]: the numcodecs that it wants has no wheel for Linux on ARM
"$PYTHON" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[sim,arm,train]" pytest hypothesis
# where this fails, the engine would run from Python, and every test of it pass
"$PYTHON" -c 'from bacinfer.core.engines.fused.native_library import native_library; native_library()'

[ $# -gt 0 ] || set -- -rs tests/core tests/test_shipped_policies.py
OMP_NUM_THREADS=1 exec "$PYTHON" -m pytest "$@"
