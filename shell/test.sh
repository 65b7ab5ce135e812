#!/usr/bin/env bash
# Everything that continuous integration checks: lint, types, import contracts, tests. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install test

# The report is tested in Chromium where that can be had; elsewhere those tests are skipped and say so.
if ! command -v chromedriver >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    echo "installing chromium for the tests of the report ..." >&2
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends \
        chromium chromium-driver; } >/dev/null || echo "chromium could not be installed" >&2
fi

BIN="$(dirname "$PYTHON")"
"$BIN/ruff" format --check .
"$BIN/ruff" check .
"$BIN/mypy"
"$BIN/lint-imports"
NO_MKDOCS_2_WARNING=1 "$BIN/mkdocs" build --strict --quiet  # a link, page or docstring that does not hold is an error
"$PYTHON" -m pre_commit validate-config
# Tiny models gain nothing from threads; the test processes share the cores instead.
export OMP_NUM_THREADS=1
"$PYTHON" -m pytest -n "${PYTEST_WORKERS:-2}" "$@"
if [ $# = 0 ] && grep -qsw avx512f /proc/cpuinfo; then
    echo "compiled code once more, as on processors without AVX-512" >&2
    CXX="${CXX:-c++} -mno-avx512f" "$PYTHON" -m pytest -n "${PYTEST_WORKERS:-2}" \
        tests/core/fused/test_fused_engine.py -k "native or random_schedules"
fi
