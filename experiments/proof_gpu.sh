#!/usr/bin/env bash
# The proof study at 135 M parameters on one GPU: the arms of docs/proof.md, 34 M tokens each at two rates, in calls of at
# most ten minutes, what tells most first. Call it again to continue; the table comes last.
#
#   experiments/proof_gpu.sh MODEL TEXT [REPORT [OTHER [BENCHMARKS]]]
#
# MODEL: a checkpoint directory (experiments/smollm2.py makes one). TEXT: training text, say .jsonl.gz. REPORT: text of the
# same kind, OTHER: text of another, that nothing is trained or chosen on. BENCHMARKS: a directory for `trilobit eval
# --task-data`; with it a call trains nothing, but measures the five benchmarks of each model that is finished.
# Records are in docs/data/proof/smollm2, and copied to the directory that OUT names, if it is set.
# Not yet run on a GPU: docs/LOG.md says what has been seen.
set -euo pipefail
cd "$(dirname "$0")/.."
model=$1 text=$2 report=${3:-} other=${4:-} benchmarks=${5:-}
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python3 -c 'import torch; assert torch.cuda.is_available(), "no CUDA device: this study needs one"'
study=(experiments/proof.py smollm2 "$model" --data "$text" ${report:+--report "$report"} ${other:+--other "$other"} \
    --minutes 9 --device cuda --one-rung --keep --budget 33554432 --rates 1e-3 2e-3 --arms \
    every-global-kl recipe-hf-blog none-immediate-kl every-ones-immediate-ce none-global-kl every-ones-layerwise-ce \
    every-immediate-kl full-precision)
if [ -n "$benchmarks" ]; then
    for record in out/proof/smollm2/*/*/run.json; do
        run=$(dirname "$record")
        [ ! -e "$run/five.json" ] || continue
        python3 -m trilobit eval "$run" --tasks five --task-data "$benchmarks" --original "$model" --device cuda --json \
            > "$run/five.json.part"
        mv "$run/five.json.part" "$run/five.json"
    done
    exec python3 -c 'import json, sys; [print(p, json.load(open(p))["retention"]) for p in sys.argv[1:]]' out/proof/smollm2/*/*/five.json
fi
[ -z "${OUT:-}" ] || trap 'cp -r docs/data/proof/smollm2 "$OUT"' EXIT
python3 "${study[@]}"
