#!/usr/bin/env bash
# The proof study at 135 M parameters on one GPU: eight arms of experiments/proof_arms.py, 33 M tokens each, in calls of at
# most ten minutes. Call it again to continue; the table comes last.
#
#   experiments/proof_gpu.sh MODEL TEXT [REPORT [OTHER]]
#
# MODEL: a checkpoint directory (experiments/smollm2.py makes one). TEXT: training text, say .jsonl.gz. REPORT: text of the
# same kind, OTHER: text of another, that nothing is trained or chosen on.
# Not yet run on a GPU: docs/LOG.md says what has been seen.
set -euo pipefail
cd "$(dirname "$0")/.."
model=$1 text=$2 report=${3:-} other=${4:-}
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python3 -c 'import torch; assert torch.cuda.is_available(), "no CUDA device: this study needs one"'
exec python3 experiments/proof.py smollm2 "$model" --data "$text" ${report:+--report "$report"} ${other:+--other "$other"} \
    --minutes 9 --device cuda --one-rung --budget 33M --rates 8e-4 --arms \
    full-precision none-immediate-ce every-ones-immediate-ce every-layerwise-ce every-global-ce every-global-kl \
    none-immediate-kl recipe-weights-only
