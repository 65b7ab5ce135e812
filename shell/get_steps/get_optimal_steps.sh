#!/usr/bin/env bash
# Finds the update steps of the policies of several tasks (see --help).
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
run_module bacinfer.commands.steps_of_tasks "$@"
