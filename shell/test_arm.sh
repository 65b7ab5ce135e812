#!/usr/bin/env bash
# Compiled code as 64-bit ARM processors run it, on any other: compiled by a cross compiler, run by an emulator, and
# compared with PyTorch, instruction by instruction and as whole programs. Says nothing about speed.
# Needs Debian's g++-aarch64-linux-gnu and qemu-user. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
export CXX="${CXX:-aarch64-linux-gnu-g++}" BACINFER_EMULATOR="${BACINFER_EMULATOR:-qemu-aarch64}"
for tool in "${CXX%% *}" "${BACINFER_EMULATOR%% *}"; do
    command -v "$tool" >/dev/null ||
        { echo "error: there is no $tool; on Debian: apt install g++-aarch64-linux-gnu qemu-user" >&2; exit 2; }
done
install test

FUSED=tests/core/fused
OMP_NUM_THREADS=1 exec "$PYTHON" -m pytest "$FUSED/test_native.py" "$FUSED/test_fused_engine.py" \
    -k "test_native or native or random_schedules or any_number_of_threads" "$@"
