#!/usr/bin/env bash
# Everything a GPU has to show, in one call of at most ten minutes: are the kernels right, what do they cost, what does a
# training step cost, how fast does it decode. Each part is kept in OUT and not run again.
#
#   bench/gpu.sh MODEL [OUT]
#
# MODEL: a checkpoint directory (experiments/smollm2.py makes one). Not yet run on a GPU: docs/LOG.md says what has been seen.
# Packages of others that it times are installed under OUT from out/wheels, if they are there; else their rows say "not
# installed". To fetch them, where there is a network (`pip download` would bring gemlite, which PyPI has as source, unbuilt):
#
#   python3 -m pip wheel --no-deps -w out/wheels onebitllms gemlite liger-kernel
set -euo pipefail
cd "$(dirname "$0")/.."
model=$1 out=${2:-out/gpu}
device=${DEVICE:-cuda}
mkdir -p "$out"
for peer in onebitllms gemlite liger-kernel; do
    if compgen -G "out/wheels/${peer//-/_}-*.whl" > /dev/null && [ ! -d "$out/peers/${peer//-/_}" ]; then
        python3 -m pip install --quiet --no-deps --no-index --find-links out/wheels --target "$out/peers" "$peer" || true
    fi
done
export PYTHONPATH="src:$out/peers${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [ "$device" = cuda ]; then
    python3 -c 'import torch; assert torch.cuda.is_available(), "no CUDA device: these tables need one"'
fi

part() { # part NAME COMMAND…: run it once, keep what it prints
    local name=$1
    shift
    if [ ! -e "$out/$name.txt" ]; then
        timeout 240 "$@" > "$out/$name.partial" 2> "$out/$name.err" || { tail -n 5 "$out/$name.err"; return 0; }
        mv "$out/$name.partial" "$out/$name.txt"
    fi
}

if [ "$device" = cuda ]; then
    part gpu-kernels python3 bench/gpu_kernels.py
    part muon python3 bench/muon.py "$model" --device cuda
else
    part gpu-kernels env TRITON_INTERPRET=1 python3 bench/gpu_kernels.py --device "$device"
fi
part kernels python3 bench/kernels.py --device "$device" ${KERNELS:-}
part kernels-compiled python3 bench/kernels.py --device "$device" --compile ${KERNELS:-}
part step-compiled python3 bench/tune_step.py "$model" --device "$device" --batch "${BATCH:-32}" --compile --precision bf16 ${STEP:-}
part step python3 bench/tune_step.py "$model" --device "$device" --batch "${BATCH:-32}" --precision bf16 ${STEP:-}
part decode python3 bench/decode.py "$model" --device "$device" ${DECODE:-}
part decode-batch python3 bench/decode.py "$model" --device "$device" --batch 32 ${DECODE:-}
if [ "$device" = cuda ]; then # last: gemlite tunes itself in both
    part gpu-peers python3 bench/gpu_kernels.py --peers
    part decode-gemlite python3 bench/decode.py "$model" --gemlite ${DECODE:-}
else
    part gpu-peers env TRITON_INTERPRET=1 python3 bench/gpu_kernels.py --device "$device" --peers
    part decode-gemlite python3 bench/decode.py "$model" --device "$device" --gemlite ${DECODE:-}
fi

git rev-parse HEAD 2> /dev/null || true
for file in "$out"/*.txt "$out"/*.partial; do # what did not end is shown, too, and run again by the next call
    if [ -e "$file" ]; then
        echo "── $(basename "$file" .txt)"
        cat "$file"
    fi
done
