"""What narrower or copied moments cost in the optimizer's own time, and recomputed activations in that of a training step.

    python bench/optimizer_state.py [--threads 1] [--rounds 3]

Sixteen matrices of 1536 × 576 (14 M numbers) on the CPU, ways of storing interleaved, medians; ratios are to the same
optimizer in fp32. `copied` is --offload without a link to cross: only the copies. The training step is the 3.5 M Llama's on
8 × 256 tokens, forward and backward. experiments/state_price.py has the price in loss.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from trilobit.config.training import TrainingConfig
from trilobit.train.adamw import AdamW, State
from trilobit.train.layers import prepare_layers
from trilobit.train.loop import BETAS
from trilobit.train.muon import Muon
from trilobit.train.shape import shape_config

WAYS: list[tuple[str, type[AdamW], State, bool]] = [
    ("AdamW, fp32", AdamW, "fp32", False),
    ("AdamW, bf16", AdamW, "bf16", False),
    ("AdamW, fp32, copied", AdamW, "fp32", True),
    ("Muon, fp32", Muon, "fp32", False),
    ("Muon, bf16", Muon, "bf16", False),
    ("Muon, int8", Muon, "int8", False),
]


def optimizer_seconds(kind: type[AdamW], state: State, offload: bool) -> float:
    """A step's, after two to warm up."""
    parameters = [nn.Parameter(torch.randn(1536, 576)) for _ in range(16)]
    optimizer = kind([{"params": parameters, "muon": True}], 1e-3, BETAS, state=state, offload=offload)
    times = []
    for _ in range(7):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        begun = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[2:])


def training_seconds(recompute: bool) -> float:
    config = shape_config("llama-3m", 256)
    config.vocab_size = 4096
    model = AutoModelForCausalLM.from_config(config).train()
    prepare_layers(model, TrainingConfig(data="", activation_checkpointing=recompute), compiled=False)
    tokens, times = torch.randint(0, 4096, (8, 256)), []
    for _ in range(6):
        begun = time.perf_counter()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    calls: dict[str, Callable[[], float]] = {name: lambda way=way: optimizer_seconds(*way) for name, *way in WAYS} | {
        "training step": lambda: training_seconds(False),
        "training step, recomputed": lambda: training_seconds(True),
    }
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(arguments.rounds):
        for name, call in calls.items():
            found[name].append(call())
    for name, times in found.items():
        plain = found[next(other for other in calls if other.split(",")[0] == name.split(",")[0])]
        ratio = statistics.median(a / b for a, b in zip(times, plain, strict=True))
        print(f"{name:<28}{1000 * statistics.median(times):>10.1f} ms{ratio:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
