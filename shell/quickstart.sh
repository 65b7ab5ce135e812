#!/usr/bin/env bash
# Installs the project into .venv, then analyses the shipped Push-T policy, caches it, and compares rollouts.
# Arguments go to `bacinfer demo` (see --help).
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install sim

"$PYTHON" -m bacinfer.commands.demo "$@"
