#!/usr/bin/env bash
# The proof study at 135 M parameters on one GPU: the arms of experiments/proof.py, 33 M tokens each, in calls of at most
# ten minutes. Call it again to continue; the table comes last.
#
#   experiments/proof_gpu.sh MODEL TEXT [OUT]
#
# MODEL: a checkpoint directory (experiments/smollm2.py makes one). TEXT: training text, say .jsonl.gz.
# Not yet run on a GPU: docs/LOG.md says what has been seen.
set -euo pipefail
cd "$(dirname "$0")/.."
model=$1 text=$2 out=${3:-out/proof}
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"
python3 -c 'import torch; assert torch.cuda.is_available(), "no CUDA device: this study needs one"'
exec python3 experiments/proof.py "$model" --data "$text" --out "$out" --tokens 33M --minutes 9 --device cuda --compile yes
