"""What `trilobit outliers` needs beside the model itself: the peak of resident memory above the loaded model, and its time.

    python bench/outliers.py [--model llama-1.4b] [--protocol contextual] [--tokens 4096] [--precision fp32]

A model of random weights of one of our shapes reads random tokens by a protocol, at the command's own batch. Linux only.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from trilobit.config.outliers import OutliersConfig
from trilobit.measure.contextual import measure_contextual
from trilobit.measure.kurtosis import measure_osp
from trilobit.train.shape import shape_config

STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def megabytes(field: str) -> float:
    """VmRSS or VmHWM (its peak) of this process."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def peak_above(work: Callable[[], object]) -> tuple[float, float]:
    """MB above what is resident before, and seconds."""
    before, start = megabytes("VmRSS"), time.perf_counter()
    REFERENCES.write_text("5")  # forget the peak so far
    work()
    return megabytes("VmHWM") - before, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama-1.4b")
    parser.add_argument("--protocol", choices=("contextual", "osp"), default="contextual")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    arguments = parser.parse_args()
    settings = OutliersConfig(model=arguments.model, data="")
    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape_config(arguments.model, settings.length("osp")), dtype=dtype).eval()
    count, size = (sum(f(p) for p in model.parameters()) for f in (torch.numel, lambda p: p.nbytes))
    print(f"{arguments.model}: {count / 1e6:,.0f} M parameters, {size / 1e6:,.0f} MB; {arguments.tokens:,} tokens")

    length = settings.length(arguments.protocol)
    windows = torch.randint(0, model.config.vocab_size, (max(1, arguments.tokens // length), length))
    if arguments.protocol == "osp":
        above, seconds = peak_above(lambda: measure_osp(model, windows, False))
    else:
        above, seconds = peak_above(lambda: measure_contextual(model, windows, str, sequences=settings.sequences))
    print(f"{arguments.protocol}: {above:,.0f} MB above the model, {seconds:,.0f} s")


if __name__ == "__main__":
    main()
