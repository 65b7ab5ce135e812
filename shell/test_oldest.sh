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
"$PYTHON" -m pip install --quiet --disable-pip-version-check -c shell/oldest.txt \
    -e ".[sim,zarr]" safetensors pytest hypothesis
[ $# -gt 0 ] || set -- tests/core tests/policies tests/analysis
# Left out is what these releases themselves do otherwise: PyTorch 2.3 draws other noise in half precision, and its encoder
# cannot run under autocast; diffusers 0.15 thresholds pictures only, and knows no spacing of timesteps.
FUSED=tests/core/fused/test_fused_engine.py
OMP_NUM_THREADS=1 "$PYTHON" -m pytest "$@" \
    --deselect "$FUSED::test_autocast_is_followed" --deselect "$FUSED::test_half_precision_weights" \
    --deselect "$FUSED::test_no_action_is_finite_where_halves_overflow[encoder_only]" \
    --deselect "$FUSED::test_auto_runs_it_eagerly_and_says_why_once[with_another_scheduler-dynamic thresholding]" \
    --deselect "tests/core/test_samplers.py::test_ddim_is_that_of_diffusers[{'timestep_spacing': 'trailing'}"
