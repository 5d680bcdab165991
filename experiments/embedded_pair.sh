#!/usr/bin/env bash
# The checkpoint that ships inside the package, and its twin: one trained outlier-safe (Muon, single-scale norms, embedding
# projections), the other as models are (Adam, RMSNorm), on the same tokens of the standard library, each at rates a factor of
# two apart until the best has a worse one on either side. Then all are measured at four bits and looked through for outliers, and
# the best are tuned to ternary on equal tokens. Half an hour a training on one core, two side by side. Call it again to continue;
# the table is last.
#
#   experiments/embedded_pair.sh [OUT]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-out/pair}
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1
python=${PYTHON:-python3}
mkdir -p "$out"

# Four epochs of 2.9 M tokens: more memorise (docs/LOG.md).
train() {
    local recipe=$1 rate run resume=()
    for rate in "${@:2}"; do
        run=$out/$recipe-$rate resume=()
        [ -e "docs/data/embedded_pair/$recipe-$rate.json" ] && continue
        grep -q '"result"' "$run/run.json" 2>/dev/null && continue
        [ -e "$run/run.json" ] && resume=(--resume)
        "$python" -W ignore -m trilobit.cli pretrain llama-3m --recipe "$recipe" --train-tokenizer 4096 --data stdlib \
            --sequence-length 512 --batch-tokens 4096 --max-tokens 11.6M --eval-tokens 65536 --eval-every 725k \
            --lr "$rate" --precision bf16 --compile yes --out "$run" "${resume[@]}" >"$run.log" 2>&1
    done
}
train osp 2e-3 4e-3 8e-3 1.6e-2 & first=$!
train adam 1e-3 2e-3 4e-3 & second=$!
wait $first
wait $second
exec "$python" -W ignore experiments/embedded_pair.py "$out"
