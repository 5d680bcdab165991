#!/usr/bin/env bash
# Kernels, engine and their self-tests under AddressSanitizer and UndefinedBehaviorSanitizer, then under ThreadSanitizer.
# usage: native/sanitize.sh [seconds of each] [seed]
set -euo pipefail
cd "$(dirname "$0")"
common="-std=c++20 -O1 -g -ffp-contract=off -fno-omit-frame-pointer -pthread -w -Wno-psabi"
avx512="-mavx512f -mavx512bw -mavx512vl -mavx512vnni"
floats="-ffp-contract=fast"
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT

build() {  # name, sanitizer flags
    local flags="$common $2" objects="" unit
    compile() { g++ $flags "${@:3}" -c "$2" -o "$directory/$1.o"; }
    library() { compile "$@"; objects="$objects $directory/$1.o"; }
    for unit in scalar pool dispatch engine sample bf16; do library $unit $unit.cpp; done
    library floats floats.cpp $floats
    if [ "$(uname -m)" = x86_64 ]; then
        library avx2 avx2.cpp -mavx2
        library avxvnni avxvnni.cpp -mavx2 -mavxvnni
        library avx512 avx512.cpp $avx512
        library avx512vbmi avx512.cpp $avx512 -mavx512vbmi
        library avx512bf16 avx512bf16.cpp $avx512 -mavx512bf16
        library floats_avx2 floats.cpp $floats -mavx2 -mfma
        library floats_avx512 floats.cpp $floats $avx512
    else
        library neon neon.cpp -march=armv8.2-a+dotprod
    fi
    for unit in selftest selftest_engine; do
        compile $unit $unit.cpp
        g++ $flags $objects "$directory/$unit.o" -o "$directory/$1_$unit"
    done
}

for kind in address thread; do
    build $kind "-fsanitize=$([ $kind = address ] && echo "address,undefined -fno-sanitize-recover=all" || echo thread)"
    for test in selftest selftest_engine; do "$directory/${kind}_$test" "${1:-5}" "${2:-1}"; done
done
