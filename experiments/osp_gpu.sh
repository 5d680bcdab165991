#!/usr/bin/env bash
# The same six rows on one GPU: models of 60 M parameters, 210 M tokens each, in calls of at most ten minutes.
#
#   experiments/osp_gpu.sh TEXT [REPORT]
#
# Call it again to continue, all rows at the middle rate first, then at the others; the tables come last. Records are in
# docs/data/osp/60m, and copied to the directory that OUT names, if it is set. Not yet run on a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
text=$1 report=${2:-}
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python3 -c 'import torch; assert torch.cuda.is_available(), "no CUDA device: this study needs one"'
[ -z "${OUT:-}" ] || trap 'cp -r docs/data/osp/60m "$OUT"' EXIT
python3 experiments/osp_ablation.py 60m --data "$text" --minutes 9 --device cuda ${report:+--report "$report"}
