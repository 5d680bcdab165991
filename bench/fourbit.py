"""`trilobit quantize`: what fake quantisation, GPTQ and the Hadamard transform cost, each against its peer in the same run.

    python bench/fourbit.py MODEL [--data stdlib] [--rounds 3] [--gptq] [--samples 16] [--length 2048] [--only PART]

forward    a bf16 forward over 4 × 512 tokens at 4-4-4 (osp, + FFN Hadamard) / the plain bf16 forward, interleaved
hadamard   the transform of 2,048 rows at width 2,048 / the dense product with the matrix, fp32, interleaved
gptq       wall time of GPTQ on --samples × --length tokens (with --gptq), of which rounding to nearest is said apart; beside
           gptqmodel's weight-only pass on the same tokens, with the same search for clips, where that package is installed
           (7.7.0 runs beside torch 2.13: pip install --no-deps --no-build-isolation gptqmodel device-smi logbar tokenicer
           defuser pypcre torchao). Models must be local: HF_HUB_OFFLINE=1
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from trilobit.config.quantize import QuantizeConfig
from trilobit.fourbit.calibration import calibration_windows
from trilobit.fourbit.fake import prepare, round_weights
from trilobit.fourbit.gptq_layers import gptq
from trilobit.fourbit.hadamard import transform as hadamard
from trilobit.fourbit.protocol import PRESETS
from trilobit.infer.load import load
from trilobit.surgery.roles import vocabulary_size


def interleaved(first: Callable[[], Any], second: Callable[[], Any], rounds: int) -> tuple[float, float, float]:
    """Median seconds of each and the median of the rounds' ratios first / second, after a warm-up of both."""
    times: tuple[list[float], list[float]] = ([], [])
    for round_ in range(rounds + 1):
        for work, found in zip((first, second), times, strict=True):
            start = time.perf_counter()
            work()
            if round_:
                found.append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(*times, strict=True)]
    return statistics.median(times[0]), statistics.median(times[1]), statistics.median(ratios)


@torch.no_grad()
def forward(model: str, rounds: int) -> None:
    plain, fake = (load(model, dtype=torch.bfloat16).model for _ in range(2))
    ids = torch.randint(0, vocabulary_size(plain), (4, 512), generator=torch.Generator().manual_seed(0))
    for rotate in ("none", "ffn"):
        protocol = PRESETS["osp"].rotated(rotate)
        prepared = prepare(fake, protocol)
        with prepared.computing(protocol):
            ours, theirs, ratio = interleaved(
                lambda: fake(input_ids=ids, use_cache=False), lambda: plain(input_ids=ids, use_cache=False), rounds
            )
        print(f"forward, rotate {rotate}: {ours:.3f} s, plain bf16 {theirs:.3f} s, ratio {ratio:.2f} (target ≤ 2.0)")


def transform(rounds: int, width: int = 2048) -> None:
    x = torch.randn(2048, width)
    matrix = hadamard(torch.eye(width))
    assert torch.allclose(hadamard(x), x @ matrix, atol=1e-3)
    ours, dense, ratio = interleaved(lambda: hadamard(x), lambda: x @ matrix, rounds)
    print(f"hadamard, {width}: {1e3 * ours:.2f} ms, dense {1e3 * dense:.2f} ms, {1 / ratio:.1f} times as fast (target ≥ 5)")


def calibrated(arguments: argparse.Namespace) -> None:
    protocol = replace(
        PRESETS["osp"], method="gptq", calibration_samples=arguments.samples, calibration_length=arguments.length
    )
    config = QuantizeConfig(models=(arguments.model,), data="stdlib", calibration=arguments.data)
    loaded = load(arguments.model)
    windows = calibration_windows(loaded, config, protocol)
    prepared = prepare(loaded.model, protocol)
    start = time.perf_counter()
    gptq(prepared, windows, protocol)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    round_weights(prepared, protocol)
    rounding = time.perf_counter() - start
    print(f"gptq, {arguments.samples} × {arguments.length} tokens: {seconds:.0f} s; rounding to nearest {rounding:.0f} s")
    peer(arguments, windows, seconds)


def peer(arguments: argparse.Namespace, windows: torch.Tensor, seconds: float) -> None:
    # Its pool of max(1, (cores + 1) // 2) workers has to have two, which a two-core machine's has not; and it would compile
    # a packer in C++, for minutes, within the time taken.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")
    try:
        from gptqmodel import GPTQModel  # pyright: ignore[reportMissingImports]
        from gptqmodel import QuantizeConfig as PeerConfig
    except ImportError:
        print("gptqmodel is not installed: no peer")
        return
    settings = PeerConfig(
        bits=4,
        group_size=-1,
        sym=True,
        desc_act=False,
        act_group_aware=False,  # on by default, and refused without groups
        damp_percent=0.01,
        mse=2.4,  # the search of the clip that ours makes too: the same norm and candidates
        lm_head=False,
        offload_to_disk=False,  # else weights are read and written within the time taken
        device="cpu",
    )
    model = GPTQModel.load(arguments.model, settings, dtype=torch.float32)  # ours computes in fp32; its choice is bf16
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in windows]
    start = time.perf_counter()
    model.quantize(rows, batch_size=1)
    theirs = time.perf_counter() - start
    packing = model.quant_region_timer.snapshot()["submodule_finalize_pack"]["total"]
    print(f"\ngptqmodel: {theirs:.0f} s, of which packing {packing:.0f} s, ratio {seconds / theirs:.2f} (target ≤ 0.8)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--gptq", action="store_true")
    parser.add_argument("--only", choices=["forward", "hadamard", "gptq"])
    arguments = parser.parse_args()
    if arguments.only in (None, "hadamard"):
        transform(arguments.rounds)
    if arguments.only in (None, "forward"):
        forward(arguments.model, arguments.rounds)
    if arguments.gptq or arguments.only == "gptq":
        calibrated(arguments)


if __name__ == "__main__":
    main()
