#!/usr/bin/env bash
# Everything that continuous integration checks: lint, types, import contracts, tests. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install test

BIN="$(dirname "$PYTHON")"
"$BIN/ruff" format --check .
"$BIN/ruff" check .
"$BIN/mypy"
"$BIN/lint-imports"
"$PYTHON" -m pre_commit validate-config
# Tiny models gain nothing from threads; the test processes share the cores instead.
OMP_NUM_THREADS=1 "$PYTHON" -m pytest -n "${PYTEST_WORKERS:-2}" "$@"
