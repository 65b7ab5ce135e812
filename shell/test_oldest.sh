#!/usr/bin/env bash
# The tests of what runs with a policy (core, policies, analysis), on the oldest supported releases (shell/oldest.txt).
# In an environment of its own: needs Python 3.10 and gigabytes of disk. Arguments go to pytest.
export BACINFER_VENV="${BACINFER_OLDEST_VENV:-.venv-oldest}"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

OLDEST="${PYTHON_OLDEST:-python3.10}"
if [ ! -x "$VENV/bin/python" ]; then
    "$OLDEST" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 10))' ||
        { echo "error: $OLDEST is no Python 3.10; name one with PYTHON_OLDEST=..." >&2; exit 2; }
    "$OLDEST" -m venv "$VENV"
fi
PYTHON="$VENV/bin/python"
"$PYTHON" -m pip install --quiet --disable-pip-version-check -c shell/oldest.txt -e ".[sim,zarr]" safetensors pytest hypothesis
[ $# -gt 0 ] || set -- tests/core tests/policies tests/analysis
OMP_NUM_THREADS=1 "$PYTHON" -m pytest "$@"
