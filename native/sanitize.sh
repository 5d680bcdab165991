#!/usr/bin/env bash
# The kernels and their self-test under AddressSanitizer and UndefinedBehaviorSanitizer, then the pool under ThreadSanitizer.
# usage: native/sanitize.sh [seconds of each] [seed]
set -euo pipefail
cd "$(dirname "$0")"
common="-std=c++20 -O1 -g -ffp-contract=off -fno-omit-frame-pointer -pthread -w -Wno-psabi"
avx512="-mavx512f -mavx512bw -mavx512vl -mavx512vnni"
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT

build() {  # name, sanitizer flags
    local flags="$common $2" objects="" unit
    compile() { g++ $flags "${@:3}" -c "$2" -o "$directory/$1.o"; objects="$objects $directory/$1.o"; }
    for unit in scalar pool dispatch selftest; do compile $unit $unit.cpp; done
    if [ "$(uname -m)" = x86_64 ]; then
        compile avx2 avx2.cpp -mavx2
        compile avxvnni avxvnni.cpp -mavx2 -mavxvnni
        compile avx512 avx512.cpp $avx512
        compile avx512vbmi avx512.cpp $avx512 -mavx512vbmi
    else
        compile neon neon.cpp -march=armv8.2-a+dotprod
    fi
    g++ $flags $objects -o "$directory/$1"
}

build address "-fsanitize=address,undefined -fno-sanitize-recover=all"
"$directory/address" "${1:-5}" "${2:-1}"
build thread "-fsanitize=thread"
"$directory/thread" "${1:-5}" "${2:-1}"
