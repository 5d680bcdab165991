#!/usr/bin/env bash
# Models that were pre-trained without outliers, made ternary, in stock llama.cpp: a tied one (Muon and single-scale norms) as its
# `bitnet` graph, with norms at outputs, and with norms everywhere and scalar gains (block norms stay one scale each, so that two
# norms in a row are one); a full outlier-safe one (untied, its embedding projections folded) as its `llama` graph, without norms.
# All exports print the table of their verification.
# Two CPU cores: twenty minutes.
#
#   experiments/outlier_safe_exports.sh [OUT [TOKENS]]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-out/outlier-safe-exports} tokens=${2:-1M}
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
trilobit() { "$python" -W ignore -m trilobit.cli "$@"; }
mkdir -p "$out/tied"
cat >"$out/tied/config.json" <<'JSON'
{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 768,
 "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 2048,
 "rms_norm_eps": 1e-06, "vocab_size": 4096, "tie_word_embeddings": true}
JSON

common=(--data stdlib --max-tokens "$tokens" --batch-tokens 4096 --sequence-length 256 --sequences 16)
trilobit pretrain "$out/tied" --recipe ssnorm --train-tokenizer 4096 --lr 4e-3 "${common[@]}" --out "$out/ssnorm"
trilobit pretrain llama-3m --recipe osp --train-tokenizer 4096 --lr 4e-3 "${common[@]}" --out "$out/osp"
trilobit tune "$out/ssnorm/model" --placement output --lr 4e-3 "${common[@]}" --out "$out/ssnorm-ternary"
trilobit tune "$out/ssnorm/model" --placement every --gain scalar --lr 4e-3 "${common[@]}" --out "$out/ssnorm-every"
trilobit tune "$out/osp/model" --placement none --lr 4e-3 "${common[@]}" --out "$out/osp-ternary"
trilobit export "$out/ssnorm-ternary" --to gguf --out "$out/ssnorm.gguf"
trilobit export "$out/ssnorm-every" --to gguf --out "$out/ssnorm-every.gguf"
trilobit export "$out/osp-ternary" --to gguf --out "$out/osp.gguf"
