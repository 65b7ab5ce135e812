# Sourced by the other scripts: goes to the project's root and sets $PYTHON.
set -euo pipefail
CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."  # (an exported CDPATH would lead to another "shell/..")

VENV="${BACINFER_VENV:-.venv}"
if [ -x "$VENV/bin/python" ]; then PYTHON="$VENV/bin/python"; else PYTHON=python3; fi

# Makes the virtual environment if it is missing, and installs the project with the given extra, once for each state
# of the files that say what to install.
install() {
    if [ ! -x "$VENV/bin/python" ]; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
            { echo "error: Python 3.10 or later is needed, found $(python3 --version)" >&2; exit 2; }
        python3 -m venv "$VENV"
    fi
    PYTHON="$VENV/bin/python"
    local stamp="$VENV/.installed-$1" state
    state="$(cat pyproject.toml constraints.txt | cksum) $PWD"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$state" ]; then
        echo "installing bacinfer[$1] into $VENV (PyTorch alone can take minutes) ..." >&2
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$1]"
        echo "$state" > "$stamp"
    fi
}

# Runs a module of bacinfer in place of this script.
run_module() {
    [ -z "${BACINFER_VENV:-}" ] || [ -x "$VENV/bin/python" ] ||
        { echo "error: BACINFER_VENV is $VENV, where there is no bin/python" >&2; exit 2; }
    "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("bacinfer") is None)' ||
        { echo "error: bacinfer is not installed for $PYTHON; run bash shell/quickstart.sh first" >&2; exit 2; }
    exec "$PYTHON" -m "$@"
}
