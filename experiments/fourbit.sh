#!/usr/bin/env bash
# What models lose at 4 bits: the whole table of outlier-safe pre-training (arXiv 2506.19697), as one command that goes on
# where it was stopped.
#
#   experiments/fourbit.sh OUT TEST TRAIN MODEL... [-- FLAGS]
#
# TEST is measured, TRAIN calibrates GPTQ and SpinQuant. FLAGS are those of `trilobit quantize`, for example
#   experiments/fourbit.sh out/fourbit wiki.test.raw wiki.train.raw out/smollm2-base -- --max-tokens 64k --calibration-samples 16
# On two cores SpinQuant wants --learning-steps well below its 100. The tables are in OUT/report.
set -euo pipefail
out=$1 test=$2 train=$3
shift 3
models=()
while [ $# -gt 0 ] && [ "$1" != "--" ]; do models+=("$1"); shift; done
[ "${1:-}" = "--" ] && shift
resume=()
[ -e "$out/run.json" ] && resume=(--resume)
trilobit quantize "${models[@]}" --data "$test" --calibration "$train" --grid osp --out "$out" "${resume[@]}" "$@"
