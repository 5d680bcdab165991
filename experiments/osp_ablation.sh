#!/usr/bin/env bash
# The six rows of outlier-safe pre-training's ablation, models of 3.5 M parameters, 10 M tokens each, on a CPU: some hours in
# all. Call it again to continue; the table comes last.
#
#   [STUDY=3m] experiments/osp_ablation.sh TEXT [MINUTES [REPORT]]
#
# TEXT: training text, say .jsonl.gz. REPORT: text of the same kind that nothing is trained or chosen on. STUDY: 3m; 3m-rates,
# a quarter of the tokens at more rates; 3m-seed-1, another seed.
set -euo pipefail
cd "$(dirname "$0")/.."
text=$1 minutes=${2:-9} report=${3:-}
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -W ignore experiments/osp_ablation.py "${STUDY:-3m}" --data "$text" --minutes "$minutes" --device cpu \
    ${report:+--report "$report"}
