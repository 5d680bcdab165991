#!/usr/bin/env bash
# The proof study on the model inside the package, 3.5 M parameters pre-trained outlier-safe, on the text that it is of: the arms
# that README's first table has, and those around our default. One process of one thread; call it again to continue; the table
# comes last.
#
#   experiments/proof_embedded.sh [MINUTES [OTHER [TWIN]]]
#
# Rates and arms are chosen on 16 k tokens spread over the held-out part and reported on 66 k spread over it, of which some
# twentieth may be the same. OTHER: text of another kind to report on. TWIN: instead a few arms at the first budget on this
# model, the twin of experiments/embedded_pair.sh. Of two cores of a slow machine, a process on each, the first budget takes 40 minutes, the second
# an hour and a quarter.
set -euo pipefail
cd "$(dirname "$0")/.."
minutes=${1:-9} other=${2:-} twin=${3:-}
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1
if [ -n "$twin" ]; then
    exec "${PYTHON:-python3}" -W ignore experiments/proof.py embedded-twin "$twin" --data stdlib --report stdlib \
        ${other:+--other "$other"} --minutes "$minutes" --device cpu --rates 1e-3 2e-3 --arms \
        none-immediate-kl every-global-kl none-global-kl every-immediate-kl
fi
exec "${PYTHON:-python3}" -W ignore experiments/proof.py embedded src/trilobit/assets/model \
    --data stdlib --report stdlib ${other:+--other "$other"} --minutes "$minutes" --device cpu --arms \
    full-precision none-immediate-ce every-ones-immediate-ce none-immediate-kl recipe-hf-blog every-ones-layerwise-ce \
    none-global-kl every-global-kl every-global-kl-row every-immediate-kl none-immediate-kl-row
