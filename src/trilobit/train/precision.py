"""Which precision a run computes in, where `--precision auto` leaves it to the device."""

import time
from contextlib import nullcontext

import torch
import torch.nn.functional as F

ROWS, WIDTH = 256, 1024
ROUNDS = 8
WORTH = 1.25  # bf16 rounds weights and inputs anew in every pass
HOPELESS = 4.0  # times slower: no more rounds of it


def decide_precision(device: torch.device) -> tuple[str, str]:
    """`bf16` or `fp32`, and why. A GPU computes in bf16 if it has it; a CPU in what it multiplies faster, measured.

    (Many CPUs take bf16 and are slower at it: at half of fp32's rate with AVX512-BF16 on an Emerald Rapids without its AMX.)
    """
    if device.type == "cuda":
        with nullcontext() if device.index is None else torch.cuda.device(device):
            has = torch.cuda.is_bf16_supported(including_emulation=False)
        if has:
            return "bf16", "the GPU has it"
        return "fp32", "the GPU has no bf16"
    fp32, bf16 = (rate / 1e9 for rate in multiplication_rates())
    return "bf16" if bf16 > WORTH * fp32 else "fp32", f"this CPU multiplies {fp32:.0f} GFLOP/s in fp32, {bf16:.0f} in bf16"


@torch.no_grad()
def multiplication_rates() -> tuple[float, float]:
    """FLOP/s of a linear layer in fp32 and in bf16 on this CPU with torch's threads: the best of a few interleaved rounds, of
    one where bf16 is computed a number at a time."""
    operands = [(torch.ones(ROWS, WIDTH, dtype=d), torch.ones(WIDTH, WIDTH, dtype=d)) for d in (torch.float32, torch.bfloat16)]
    best = [float("inf")] * len(operands)
    for each in range(1 + ROUNDS):  # the first finds its kernel
        for i, (x, weight) in enumerate(operands):
            start = time.perf_counter()
            F.linear(x, weight)
            if each:
                best[i] = min(best[i], time.perf_counter() - start)
        if each and best[1] > HOPELESS * best[0]:
            break
    fp32, bf16 = (2 * ROWS * WIDTH * WIDTH / seconds for seconds in best)
    return fp32, bf16
