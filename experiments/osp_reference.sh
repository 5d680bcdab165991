#!/usr/bin/env bash
# The authors' published checkpoints (arXiv 2506.19697), measured as ours are: excess kurtosis by both protocols, and loss at 16
# bits and at W4A4KV4, rounded to nearest, without and with a Hadamard in front of the MLP's last linear.
#
#   experiments/osp_reference.sh TEXT [MODEL ...]
#
# Their kurtosis is of 128 × 2,048 tokens of C4's validation part, models in bf16. Needs the hub, or directories as MODELs.
set -euo pipefail
text=$1
shift
models=("$@")
if [ ${#models[@]} -eq 0 ]; then
    for row in Adam Muon-Only Muon Muon-SSNorm Muon-EmbProj Muon-SSNorm-EmbProj; do
        models+=("dmis-lab/OSP-1.4B-100B-$row")
    done
fi
for model in "${models[@]}"; do
    trilobit outliers "$model" --data "$text" --protocol both --precision bf16
    trilobit quantize "$model" --data "$text" --bits 4-4-4 --precision bf16
    trilobit quantize "$model" --data "$text" --bits 4-4-4 --rotate ffn --precision bf16
done
