#!/usr/bin/env bash
# The proof study on stories260K, a real 260 k Llama, on text sampled from itself: the loss gap is then the KL divergence to
# the original. All arms, two processes of one thread each; call it again to continue; the table comes last.
#
#   experiments/proof_stories.sh MODEL [MINUTES [OTHER]]
#
# MODEL: the directory of stories260K. OTHER: text of another kind to report on. Two cores: some hours in all.
set -euo pipefail
cd "$(dirname "$0")/.."
model=$1 minutes=${2:-9} other=${3:-}
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1
python=${PYTHON:-python3}
study=(experiments/proof.py stories260k "$model" --data self ${other:+--other "$other"} --minutes "$minutes" --device cpu)
"$python" "${study[@]}" > /dev/null &
first=$!
"$python" "${study[@]}" > /dev/null || true
wait "$first" || true
exec "$python" "${study[@]}" --table
