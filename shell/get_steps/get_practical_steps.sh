#!/usr/bin/env bash
# How often each kind of block is computed after bubbling union, and the averages (see --help).
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
run_module bacinfer.commands.info counts "$@"
