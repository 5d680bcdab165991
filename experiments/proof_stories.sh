#!/usr/bin/env bash
# The proof study on stories260K, a real 260 k Llama, on text sampled from itself: the loss gap is then the KL divergence to
# the original. The arms of docs/proof_studies.md, two processes of one thread each; call it again to continue; the table comes
# last. After them `trilobit tune` without a flag, at the same budgets, and its arm with one setting changed at a time.
#
#   experiments/proof_stories.sh MODEL [MINUTES [OTHER]]
#
# MODEL: the directory of stories260K. OTHER: text of another kind to report on. Two cores: some hours in all.
set -euo pipefail
cd "$(dirname "$0")/.."
model=$1 minutes=${2:-9} other=${3:-}
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1
python=${PYTHON:-python3}
arms=(
    full-precision none-{immediate,global,layerwise}-{ce,kl} every-{immediate,global,layerwise}-{ce,kl}
    every-ones-{immediate,layerwise}-ce output-layerwise-ce output-global-kl every-global-kl-{row,wsd} every-kl-{muon,wsd}
    none-kl-wsd warm-every-kl {none,every}-group-128-weights-only-kl none-group-128-weights-only-global-kl
    recipe-{hf-blog,bitdistill,bitdistill-normalised,paretoq,tequila,weights-only,weights-only-kl}
)
common=("$model" --data self ${other:+--other "$other"} --minutes "$minutes" --device cpu)
study=(experiments/proof.py stories260k "${common[@]}" --arms "${arms[@]}")
"$python" "${study[@]}" > /dev/null &
first=$!
"$python" "${study[@]}" > /dev/null || true
wait "$first" || true
"$python" experiments/proof.py stories260k-default "${common[@]}" --arms every-global-kl
"$python" experiments/proof.py stories260k-around "${common[@]}" --arms every-global-kl every-global-mix \
    every-global-kl-{soft,hidden,then-decay,short-ramp,long-ramp,late-activations,weight-decay,muon,scalar} \
    every-global-kl-{group-128,group-64,weights-only,embeddings} every-{layerwise,reverse}-{ce,kl} every-kl-sensitivity
exec "$python" "${study[@]}" --table
