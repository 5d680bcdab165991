#!/usr/bin/env bash
# NEON without a processor that has it: the library cross-compiled for aarch64 as build.py compiles it there, its self-tests
# under QEMU, first on a processor with the dot product (sets scalar and neon), then on one without it (scalar alone).
# Products have the bits of loops written out in selftest.cpp, on neon as on scalar. On x86_64 Linux.
# usage: native/cross.sh [seconds of each] [seed]
set -euo pipefail
cd "$(dirname "$0")"
compiler=aarch64-linux-gnu-g++
for tool in $compiler qemu-aarch64; do
    if ! command -v $tool >/dev/null; then
        echo "native/cross.sh needs $tool. Debian and Ubuntu: apt-get install g++-aarch64-linux-gnu qemu-user" >&2
        exit 2
    fi
done
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT

library=$(PYTHONPATH=../src "${PYTHON:-python3}" -m trilobit.kernels.build aarch64 $compiler)
for test in selftest selftest_engine; do
    $compiler -std=c++20 -O2 -ffp-contract=off $test.cpp "$library" -Wl,-rpath,"$(dirname "$library")" -o "$directory/$test"
done
while read -r processor sets; do
    for test in selftest selftest_engine; do
        said=$(qemu-aarch64 -L /usr/aarch64-linux-gnu -cpu "$processor" "$directory/$test" "${1:-5}" "${2:-1}")
        echo "$processor: $said"
        if [[ "$said" != *"instruction sets: $sets" ]]; then
            echo "$processor has other instruction sets than $sets" >&2
            exit 1
        fi
    done
done <<<"max scalar neon
cortex-a57 scalar"
