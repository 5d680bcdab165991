#!/usr/bin/env bash
# The proof study on SmolLM2-135M as far as a CPU goes: 65 k tokens at four rates, 0.26 M and 1 M at the best. One process of one
# thread; call it again to continue, or several at once; the table comes last. (On a GPU: experiments/proof_gpu.sh.)
#
#   experiments/proof_smollm2.sh MODEL TEXT REPORT OTHER [MINUTES]
#
# MODEL: a checkpoint directory (experiments/smollm2.py makes one). TEXT: training text, say .jsonl.gz. REPORT: text of the same
# kind, OTHER: text of another, that nothing is trained or chosen on. A core with fast bf16 products needs six minutes for 65 k tokens.
set -euo pipefail
cd "$(dirname "$0")/.."
model=$1 text=$2 report=$3 other=$4 minutes=${5:-9}
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1
exec "${PYTHON:-python3}" -W ignore experiments/proof.py smollm2-cpu "$model" --data "$text" --report "$report" \
    --other "$other" --minutes "$minutes" --device cpu --arms \
    every-global-kl every-immediate-kl none-global-kl none-immediate-kl recipe-hf-blog every-ones-immediate-ce \
    every-global-ce every-ones-layerwise-ce full-precision
