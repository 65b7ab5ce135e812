#!/usr/bin/env bash
# Unified ACS, block-wise ACS and BAC side by side on all tasks that have a checkpoint (see --help).
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
run_module bacinfer.commands.batch ablation "$@"
