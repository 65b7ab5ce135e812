#!/usr/bin/env bash
# Uniform caching on all tasks that have a checkpoint (see --help).
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
run_module bacinfer.commands.batch uniform "$@"
