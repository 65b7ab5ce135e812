#!/usr/bin/env bash
# Each block's update steps, as the scheduler found them and after bubbling union (see --help).
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
run_module bacinfer.commands.info steps "$@"
