#!/usr/bin/env bash
# Kernels, engine and their self-tests under AddressSanitizer and UndefinedBehaviorSanitizer, or under ThreadSanitizer.
# usage: native/sanitize.sh address|thread [seconds of each] [seed]
set -euo pipefail
case "${1:-}" in
    address) sanitizer="-fsanitize=address,undefined -fno-sanitize-recover=all" ;;
    thread) sanitizer="-fsanitize=thread" ;;
    *) sed -n 3p "$0" >&2; exit 2 ;;
esac
cd "$(dirname "$0")"
common="-std=c++20 -O1 -g -ffp-contract=off -fno-omit-frame-pointer -pthread -w -Wno-psabi"
avx512="-mavx512f -mavx512bw -mavx512vl -mavx512vnni"
floats="-ffp-contract=fast"
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT

flags="$common $sanitizer" objects=""
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
for test in selftest selftest_engine; do
    compile $test $test.cpp
    g++ $flags $objects "$directory/$test.o" -o "$directory/$test"
    "$directory/$test" "${2:-5}" "${3:-1}"
done
