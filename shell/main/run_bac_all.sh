#!/usr/bin/env bash
# BAC on all tasks that have a checkpoint (see --help).
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
run_module bacinfer.commands.batch bac "$@"
